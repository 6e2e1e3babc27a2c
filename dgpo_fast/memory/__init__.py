"""The memory of a run: predicted, measured, and the settings chosen to fit.

* `live.py`: bytes of live tensors, on any device;
* `simulate.py`: forward and backward passes on the meta device, which take no memory;
* `predict.py`: all memory of a run, by its kind and by phase;
* `micro_batch.py`: the largest micro-batch that fits;
* `card.py`: the settings with which a run fits on a card (`--card`), and all exact ones (`--low-memory`);
* `advice.py`: the settings that save most;
* `plan.py`: what a run uses of these modules;
* `cards.py`: on which GPUs a run fits (`python -m dgpo_fast.memory`).
"""
