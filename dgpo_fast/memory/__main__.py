"""`python -m dgpo_fast.memory`: predicts the GPU memory of a run and the cards that it fits on, without a GPU."""

from dgpo_fast.config.command_line import configure, run_command, take_count
from dgpo_fast.config.help import print_help

USAGE = """Predict how much GPU memory a run needs, and which cards it fits on. Needs no GPU and allocates no memory.

  python -m dgpo_fast.memory sd35m-geneval                  LoRA, with the recipe's settings
  python -m dgpo_fast.memory sd35m-geneval --low-memory     LoRA, with as little as possible
  python -m dgpo_fast.memory sd35m-geneval --policy.train full --optimizer.name adamw8bit
  python -m dgpo_fast.memory my.yaml --processes 8          each of eight GPUs
  python -m dgpo_fast.memory z-image-ocr --card 24GB        the settings with which it fits on a card of 24 GB

The sizes of the models in docs/families.md are known. Any other model on the hub is downloaded first."""


def memory(args: list[str]) -> int:
    """Runs the command line's prediction; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_help(USAGE, args)
        return 0
    args = list(args)
    processes = take_count(args, "processes", 1)
    config = configure(args)

    import torch  # after the command line is known to be good

    from dgpo_fast.memory.cards import CARDS_GB, fit_on, plan_on
    from dgpo_fast.models.loading import known_model, read_model

    family = known_model(config)
    if family is None:
        family = read_model(config)
    elif not config.random_weights:
        print(f"{config.model} is not downloaded: its sizes are known")
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    if config.card is not None:
        print("\n".join(plan_on(config, family, dtype, processes).lines()))
        return 0
    fits = [fit_on(config, family, dtype, card_gb, processes) for card_gb in CARDS_GB]
    print(fits[-1].prediction.line())
    rows = [["card", "micro-batch", "predicted peak", "fits"], *(fit.cells() for fit in fits)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(memory))
