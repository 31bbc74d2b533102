"""``python -m convert.verify``: measures how much a quantized model differs from its source.

* ``options``: options of the command, and their checks
* ``run``: opens and loads the models, measures, and builds the report
"""
