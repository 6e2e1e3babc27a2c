"""What a run holds in memory: predicted, measured, and chosen for.

* `live.py`: bytes of tensors alive, on any device;
* `simulate.py`: forwards and backwards on the meta device, where they take no memory;
* `predict.py`: all that a run will hold, by what holds it and by phase;
* `micro_batch.py`: the largest micro-batch that fits;
* `low.py`: the setting that saves all there is to save;
* `advice.py`: the settings that save most;
* `plan.py`: what a run uses of these;
* `cards.py`: on which GPUs a run fits (`python -m dgpo_fast.memory`).
"""
