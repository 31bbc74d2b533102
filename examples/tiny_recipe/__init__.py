"""The recipe of the built-in miniature.

=============================================  ========================================================================
``corpus``, ``conversations``                  training data: Python's standard library and generated conversations
``tasks``, ``tools``, ``word_lists``           questions and tool calls of the conversations
``tokenizer``, ``prepare``                     the tokenizer, learned from the same data
``schedule``, ``batches``                      sizes of the model, schedule, batches as a function of the step
``loss``, ``optimizer``, ``train_step``        one training step
``training_loop``, ``training_checkpoint``     the run: steps, log, probes, resuming
``held_out_tasks``, ``evaluate``               evaluation on held-out data; uses ``bits_per_byte``, ``greedy_decode``
``teacher_forcing``                            accuracy probe during training
``publish``, ``export``, ``model_card``        the published folder: weights, tokenizer, metrics, card
=============================================  ========================================================================
"""
