"""``python -m glm_jax.plan``: the memory that a model needs, and whether it fits, before anything is loaded.

* ``options``: options of the command
* ``run``: reads the config, makes the plan and prints it
* ``compiled_loop``: compiles the decode loop for a GPU that need not be present
* ``report_tables``: the plan as tables and sentences
"""
