"""Speed and memory of the training step beside other ways to train. Results: docs/evidence/performance.md.

Commands: ``step`` (the main one), ``trainer``, ``head_loss``, ``products``, ``optimizer``, ``quantised_bases``,
``learning_rates``, ``sampling``, ``policy_step``, ``preferences``.

What they are made of: ``workloads`` (models and batches), ``setting`` (what contenders share), ``adapters``
(the factors that all get), ``contenders`` and ``other_layers`` (who takes part), ``gradients`` (who may), ``timing``,
``memory``, ``machine``, ``report``.
"""
