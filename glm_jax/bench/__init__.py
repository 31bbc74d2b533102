"""``python -m glm_jax.bench``: tokens per second of glm-jax and its peers, measured alternately in one process.

* ``options``: options of the commands
* ``run``, ``cases``: load the backends, measure every case, keep the report on disk up to date
* ``backend``: interface of a model that can be timed, with ``glm_jax_backend`` and ``transformers_backend``
* ``timing``, ``profiler``, ``hardware``: times and speeds, operations on the GPU, bandwidth and host memory
* ``report_tables``: a report as Markdown
* ``projection``: speeds that a report predicts for other GPUs
"""
