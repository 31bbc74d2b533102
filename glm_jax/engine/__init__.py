"""The engine: turns prompts and options into requests, batches them, runs compiled steps, and returns completions.

In the order of a call: ``input_processor`` (prompts to requests), ``scheduler`` (requests to batches), ``runner``
(prefill, then decode), ``steps`` (the compiled functions), ``request`` (tokens to text), ``outputs`` and ``chat``
(completions). ``scoring`` computes logits without generating. ``model_loader`` and ``assets`` load a model,
``compile_cache`` and ``aot`` deal with compiled programs, ``metrics`` with timing.
"""
