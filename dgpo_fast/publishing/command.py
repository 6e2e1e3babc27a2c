"""`python -m dgpo_fast.export`: a trained run as a folder that others can use, and as a model on the hub."""

from pathlib import Path

from dgpo_fast.config.help import print_settings
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.settings import is_run, run_config, trained_weights
from dgpo_fast.publishing.settings import ExportSettings
from dgpo_fast.run.folder import new_folder
from dgpo_fast.run.search import runs_there
from dgpo_fast.wording import one_line, resume_command

USAGE = """Hand a trained run on: its LoRA, or a whole pipeline, with a model card.

  python -m dgpo_fast.export runs/NAME                                  write exports/NAME
  python -m dgpo_fast.export runs/NAME --merged                         the LoRA merged into its model, as a pipeline
  python -m dgpo_fast.export runs/NAME --push account/name --dry-run    write what would be uploaded, upload nothing
  python -m dgpo_fast.export runs/NAME --push account/name              upload it to the Hugging Face hub

A LoRA is one file that diffusers reads, and ComfyUI too if it maps the names of the model's layers. The card says what
was trained on which reward and what it gained, from the run's summary.json. An upload needs a token: HF_TOKEN, or
`hf auth login`. It makes a new model on the hub, and never changes an existing one."""
OUTPUTS = Path("exports")


def export_command(args: list[str]) -> None:
    """Runs the command line's export. Raises UserError; then no folder is left, unless the upload failed."""
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, ExportSettings())
        return
    runs = args[: next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))]
    settings = resolve(ExportSettings(), parse_overrides(args[len(runs) :], ExportSettings()), "command line")
    if len(runs) != 1:
        raise UserError("command line: give one run to export: dgpo-fast export runs/NAME")
    run = Path(runs[0]).expanduser()
    folder = Path(settings.output or OUTPUTS / run.resolve().name)
    config = _exportable(run, settings)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists: remove it, or choose another --output")
    export(run, config, settings, folder)


def _exportable(run: Path, settings: ExportSettings) -> Config:
    """The configuration of the run in the folder `run`. Raises UserError if it cannot be exported like that."""
    if not is_run(str(run)):
        raise UserError(f"{run}: no run is there (it has no config.yaml){runs_there(str(run))}")
    config = run_config(str(run))
    if config.random_weights:
        raise UserError(f"{run}: its model had random weights (random_weights): nobody could use what it trained")
    trained_weights(run, config)
    if not (run / "summary.json").is_file():
        raise UserError(f"{run}: it has no summary.json, which the card is made of: make it with {resume_command(run)}")
    if settings.push is None and (settings.dry_run or settings.private):
        raise UserError(f"--{'dry-run' if settings.dry_run else 'private'}: goes with --push account/name")
    for name in ("push", "base_model"):
        _require_hub_name(f"--{name.replace('_', '-')}", getattr(settings, name))
    return config


def _require_hub_name(option: str, name: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name or "account/name")
    except HFValidationError as error:
        raise UserError(f"{option} {name}: is no name on the hub: {one_line(error)}") from None
    if name is not None and "/" not in name:
        raise UserError(f"{option} {name}: write account/name, with the account or organisation that it belongs to")


def export(run: Path, config: Config, settings: ExportSettings, folder: Path) -> None:
    """Writes `folder` and, if asked to, uploads it.

    Args:
        run: the run's folder.
        config: the run's.
        settings: how.
        folder: does not exist.

    Raises UserError as `export_command`.
    """
    from dgpo_fast.publishing import hub  # after the command line is known to be good: this takes seconds
    from dgpo_fast.publishing.card import write_card
    from dgpo_fast.publishing.handover import read_handover
    from dgpo_fast.run.console import Console

    console, name = Console(), settings.push
    if name and not settings.dry_run:
        hub.require_free(name)
    handover = read_handover(run, config, settings, folder, console.note)
    with new_folder(folder) as staged, console.track(f"writing {folder}"):
        handover.write_weights(staged)
        write_card(handover, staged)
    console.note(f"{folder}: the {handover.kind} and its card, README.md")
    if name and settings.dry_run:
        console.note(f"--dry-run: nothing was uploaded; this is what {name} would be on the hub")
    elif name:
        console.note(f"uploaded: {hub.upload(folder, name, private=settings.private)}")
    console.note(f"ComfyUI: {handover.comfyui}")
    console.note(f"load: {handover.how_to_load(folder, name or str(folder))}")
