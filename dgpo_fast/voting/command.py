"""`python -m dgpo_fast.vote`: draws groups of pictures, and lets a person judge them on a page of this machine."""

import secrets
import shlex
from contextlib import ExitStack
from pathlib import Path

from dgpo_fast.config.help import print_settings
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.settings import lasting, require_weights
from dgpo_fast.rewards.serving.server import listen, needs_server
from dgpo_fast.voting.settings import VoteSettings, prompts_to_vote_on, read_vote_settings, train_command
from dgpo_fast.wording import counted

USAGE = """Draw groups of pictures and judge them in your browser: pick the best, rank or rate, with keys or fingers.

  python -m dgpo_fast.vote runs/NAME                          a run's trained weights, on its training prompts
  python -m dgpo_fast.vote runs/NAME --weights before         the weights that it started from
  python -m dgpo_fast.vote tiny --groups 20                   a model that was not trained here
  python -m dgpo_fast.vote ./my_sd3 --prompts my_prompts.txt  the prompts of a file

The page is for this machine alone, at the address that the command prints. Ctrl-C ends; it prints where the votes are,
and the command that trains on them. The same command goes on with them.

All settings of drawing are those of `python -m dgpo_fast.evaluate`: --guidance-scale, --num-inference-steps, --lora and
others; so are --recipe and --rewards, with which the training on the votes begins."""
HOST = "127.0.0.1"
ONLY_OF_EVALUATIONS = ("rewards", "images", "prompts")


def vote(args: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, VoteSettings())
        return 0
    own, settings, base = read_vote_settings(args)
    require_weights(settings)
    prompts = prompts_to_vote_on(settings, base)

    with needs_server("vote"):  # after the command line is known to be good: these take seconds
        from dgpo_fast.voting.server import Session, application, serve
    from dgpo_fast.evaluation.drawer import Drawer
    from dgpo_fast.objectives.registry import traits
    from dgpo_fast.prompts.prompt import digest
    from dgpo_fast.run.console import Console
    from dgpo_fast.voting.drawing import GroupDrawing
    from dgpo_fast.voting.folder import VoteFolder
    from dgpo_fast.voting.page import vote_page

    console, needs = Console(), traits(base)
    folder = VoteFolder(Path(str(settings.output)), prompts[: own.groups], own.group_size)
    made_with = {name: value for name, value in lasting(settings).items() if name not in ONLY_OF_EVALUATIONS}
    made_with["prompts_sha256"] = digest(prompts)  # of all, so that more groups can be asked for later
    folder.require_same(made_with)
    learns_from_groups = needs.drawn_by == "any" and not (needs.needs_transitions or needs.single_images)
    train = train_command(settings, base, any_objective=learns_from_groups)
    with ExitStack() as ends:
        listener = ends.enter_context(listen(HOST, own.port, f"--port {own.port}"))
        ends.callback(folder.lock().release)
        folder.read_votes()
        drawer = None
        if (drawn := folder.drawn_groups()) < len(folder.prompts):
            drawer = Drawer(settings, folder.prompts, console, folder.made_with())
            folder.begin({**made_with, **drawer.made_with})
            drawer.note_differences()
            with console.track("encoding prompts") as on_step:
                drawer.encoder.prepare(folder.prompts[drawn:], on_step)
        drawing = GroupDrawing(folder, drawer, console, settings.seed)
        token = secrets.token_urlsafe(16)
        address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        console.note(f"vote at {address} and press Ctrl-C here when you are done")
        drawing.start()
        ends.callback(drawing.close)
        serve(application(Session(folder, drawing, own.ask, train), vote_page(folder.path), token), listener)
    command = shlex.join(["python", "-m", "dgpo_fast.vote", *args])
    console.note(f"{counted(folder.judged(), 'vote')} of {counted(len(folder.prompts), 'group')} in {folder.path}")
    console.note(f"train on them: {train}" if folder.judged() else "nothing to train on yet")
    if len(folder.votes) < len(folder.prompts):
        console.note(f"go on: {command}")
    if drawing.fault:
        raise UserError(drawing.fault)
    return 0
