"""Measuring the noise of the gradient in a running step.

Read in this order: `noise_scale` (estimators), `step_meter` (one measured step), `step_sample` (its result),
`sample_source` (which way to measure), `micro_gradients` and `sharded_gradients` (by micro-batches), `row_samples`,
`row_layers`, `layer_calls` and `row_gradients` (by rows), `adam_metric` and `frozen_weights` (other norms).
"""
