"""Measures the noise of the gradient in the steps of a run.

A *row* is a row of the dataset. Read in this order: `noise_scale` (estimators), `step_meter` (measures one step),
`step_sample` (its result), `sample_source` (chooses how to measure), `micro_gradients` and `sharded_gradients` (samples
are micro-batches), `row_gradients`, `row_layers`, `row_collector` and `per_example_gradients` (samples are rows),
`adam_metric` and `frozen_weights` (other metrics than the adapter gradient).
"""
