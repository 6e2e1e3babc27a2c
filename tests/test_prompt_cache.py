"""Encoded prompts on disk: the same bits, whatever is killed, damaged, full, or done at the same time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from dgpo_fast.errors import UserError
from dgpo_fast.models import loading as pipeline_module
from dgpo_fast.models import prompt_encoder as text_module
from dgpo_fast.models.loading import lacks_text_encoders, load_pipeline, text_encoders
from dgpo_fast.models.prompt_cache import PromptCache, Row, content_digest, default_folder
from dgpo_fast.models.prompt_encoder import PromptEncoder, cache_scope
from dgpo_fast.prompts import Prompt
from tests.processes import run_alone

CPU = torch.device("cpu")
GIB = 2**30
PROMPTS = ["", "a cat", "a dog", "déjà vu \U0001f408", "a\nb", "x" * 3000]


def make_row(seed: int, tokens: int = 3, dtype: torch.dtype = torch.float32) -> Row:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(tokens, 4, generator=generator).to(dtype)
    return {"prompt": prompt, "pooled": torch.randn(2, generator=generator).to(dtype)}


def same(a: Row | None, b: Row) -> bool:
    if a is None or a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b)


def make_cache(folder: Path, notes: list[str] | None = None, limit: int = GIB, **scope: object) -> PromptCache:
    return PromptCache(folder, scope, limit, note=([] if notes is None else notes).append)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_comes_back_to_the_last_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    for number, text in enumerate(PROMPTS):
        cache = make_cache(tmp_path)
        assert not cache.touch(text) and cache.load(text) is None
        cache.save(text, make_row(number, number, dtype))
    later = make_cache(tmp_path)
    for number, text in enumerate(PROMPTS):
        assert later.touch(text) and same(later.load(text), make_row(number, number, dtype))


def test_another_scope_shares_nothing(tmp_path: Path) -> None:
    make_cache(tmp_path, dtype="float32").save("a cat", make_row(0))
    assert make_cache(tmp_path, dtype="bfloat16").load("a cat") is None
    assert same(make_cache(tmp_path, dtype="float32").load("a cat"), make_row(0))


def test_any_flipped_bit_and_any_cut_is_found(tmp_path: Path) -> None:
    """Of a whole file: what is read is right, or is missed, said once, and written anew."""
    notes: list[str] = []
    cache = make_cache(tmp_path, notes)
    cache.save("a cat", make_row(0))
    path = next(tmp_path.glob("*/*/*.safetensors"))
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    damaged = [*flipped, *(whole[:length] for length in range(len(whole))), whole + b"\0"]
    unseen = 0
    for content in damaged:
        path.write_bytes(content)
        row = cache.load("a cat")
        assert row is None or same(row, make_row(0))
        assert path.exists() == (row is not None)
        unseen += row is not None
    # The prompt's text, which is only there to be read by people, and the blanks that fill the header up.
    assert unseen <= len('"text":"a cat"') + 7
    assert len(notes) == 1 and f"{path} is damaged" in notes[0] and "\n" not in notes[0]
    cache.save("a cat", make_row(0))
    assert path.exists() and same(cache.load("a cat"), make_row(0))  # the header's entries have no fixed order


def test_the_file_of_another_prompt_is_not_trusted(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.save("a cat", make_row(0))
    cat = next(tmp_path.glob("*/*/*.safetensors"))
    cache.save("a dog", make_row(1))
    dog = next(path for path in tmp_path.glob("*/*/*.safetensors") if path != cat)
    shutil.copy(cat, dog)
    assert cache.load("a dog") is None and same(cache.load("a cat"), make_row(0))


def test_the_least_recently_used_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    old, notes = make_cache(tmp_path), list[str]()
    for number in range(10):
        old.save(str(number), make_row(number, 1000))
    files = {text: old._path(text) for text in map(str, range(10))}
    for age, path in enumerate(reversed(files.values())):
        os.utime(path, (1e9 - age, 1e9 - age))  # "0" is the oldest
    size = max(path.stat().st_size for path in files.values())
    cache = make_cache(tmp_path, notes, limit=10 * size + 200)  # a longer name may take some bytes more
    assert cache.touch("0")
    cache.save("n", make_row(99, 1000))
    left = [text for text in files if files[text].exists()]
    assert left == ["0", "3", "4", "5", "6", "7", "8", "9"], "a tenth more than needed goes, so that it is seldom"
    for number in range(20, 40):
        cache.save(str(number), make_row(number, 1000))
    kept = [text for text in ["0", "n", *map(str, range(20, 40))] if cache.touch(text)]
    assert kept == ["0", "n", *map(str, range(20, 28))]
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*")) <= 10 * size + 200
    assert len(notes) == 1 and "raise --prompt-cache-gib" in notes[0]


def test_a_folder_that_cannot_be_made_costs_one_note(tmp_path: Path, random_pipeline: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    notes: list[str] = []
    encoder = make_encoder(random_pipeline, make_cache(tmp_path / "file" / "cache", notes))
    first = encoder(["a cat", "a dog"])
    assert torch.equal(encoder(["a dog"]).gathered()["prompt"][0], first.gathered()["prompt"][1])
    assert encoder.encoded_count == 3, "the empty prompt with them; memory stands in"
    assert len(notes) == 1 and notes[0].endswith(
        "cannot be written (Not a directory): newly encoded prompts stay in memory"
    )


PREAMBLE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from dgpo_fast.models import prompt_cache
from dgpo_fast.models.prompt_cache import PromptCache

folder = Path(sys.argv[1])

def make_cache(notes=None, limit=2**30):
    return PromptCache(folder, {"test": 1}, limit, ([] if notes is None else notes).append)

def make_row(number, tokens):
    return {"prompt": torch.full((tokens, 4), float(number)), "pooled": torch.full((2,), float(number))}

def check(row, number):
    assert row is None or all((tensor == number).all() for tensor in row.values()), number
    return row is not None
"""

KILLS = """
kills, torn = 0, []
while kills < 60 or len(torn) < 5:
    assert kills < 1000, "no kill met a write"
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        cache, number = make_cache(), kills % 7
        while True:
            cache.save(f"prompt {number}", make_row(number, 20_000))
            os.write(begun, b"1")
            number += 1
    os.close(begun)
    os.read(ready, 1)
    time.sleep(random.Random(kills).uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    kills += 1
    torn = list(folder.glob("*/*/.*"))
notes = []
cache = make_cache(notes)
whole = sum(check(cache.load(f"prompt {number}"), number) for number in range(1000))
assert whole >= 7 and not notes, (whole, notes)
for number in range(1000):
    cache.save(f"prompt {number}", make_row(number, 3))
    assert check(cache.load(f"prompt {number}"), number)
for path in torn:
    os.utime(path, (0, 0))
make_cache().save("one more", make_row(0, 3))
assert not list(folder.glob("*/*/.*")), "what killed writers left is removed after a while"
"""

FULL = """
for when, share in (("before the disk is full", 0.05), ("when the disk is full", -1.0)):
    prompt_cache.FREE_SHARE = share
    notes = []
    cache = make_cache(notes)
    for number in range(200):
        cache.save(f"{when} {number}", make_row(number, 500))
    stored = sum(check(make_cache().load(f"{when} {number}"), number) for number in range(200))
    assert 0 < stored < 200 and len(notes) == 1, (stored, notes)
    assert ("leaves the last 5% of the disk free" if share > 0 else "No space left on device") in notes[0]
    assert not list(folder.glob("*/*/.*"))
    for path in folder.glob("*/*/*") if share > 0 else ():
        path.unlink()
assert os.system(f"mount -o remount,ro {folder}") == 0
notes = []
cache = make_cache(notes)
readable = [number for number in range(200) if check(cache.load(f"when the disk is full {number}"), number)]
cache.save("more", make_row(0, 3))
cache.save("and more", make_row(0, 3))
assert readable and cache.touch(f"when the disk is full {readable[0]}") and not cache.touch("more")
assert len(notes) == 1 and "Read-only file system" in notes[0], notes
"""

TOGETHER = """
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.prompts import Prompt
from tests.processes import run_alone

model, start = sys.argv[2], time.monotonic() + 1
cpu, texts = torch.device("cpu"), [f"a {chr(97 + n % 26)} {n}" for n in range(40)]

def make_encoder(cache):
    pipeline = load_pipeline(model, revision=None, device=cpu, dtype=torch.float32, with_text=False)
    return PromptEncoder(pipeline, 9, cache)

children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        notes, mine = [], random.Random(number).sample(texts, 30)
        encoder = make_encoder(make_cache(notes))
        encoder.prepare([Prompt(text) for text in mine])
        assert not notes, notes
        assert encoder.encoders is None, "the text encoders have left"
        os._exit(0 if encoder(mine).rows["prompt"].isfinite().all() else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
notes = []
cache, plain = make_cache(notes), make_encoder(None)
expected = plain(texts)
assert plain.encoded_count == len(texts) + 1, "the negative prompt, which is empty"
found = 0
for row, text in enumerate(texts):
    cached = cache.load(text)
    if cached is not None:
        found += 1
        assert all(torch.equal(cached[name], rows[row]) for name, rows in expected.rows.items())
assert found > 35 and not notes, (found, notes)
"""


def run_script(script: str, *arguments: object, wrapper: list[str] | None = None) -> None:
    command = ["-c", PREAMBLE + script, *map(str, arguments)]
    if wrapper is None:
        run_alone(command)
        return
    done = subprocess.run([*wrapper, sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sigkill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """60 writers and more, killed at random moments, five of them while a file was half-written: every file is whole or
    not there, and later runs tidy up."""
    run_script(KILLS, tmp_path)


def test_processes_that_encode_the_same_prompts_at_once(tmp_path: Path, random_pipeline: Path) -> None:
    """Three runs with overlapping prompts: what they leave behind is what one process without a cache computes."""
    run_script(TOGETHER, tmp_path, random_pipeline)


def test_a_full_and_a_read_only_disk_cost_one_note(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=512k tmpfs {tmp_path} && exec "$@"'
    run_script(FULL, tmp_path, wrapper=["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"])


def make_encoder(model: Path, cache: PromptCache | None = None, **options: int) -> PromptEncoder:
    pipeline = load_pipeline(str(model), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    assert lacks_text_encoders(pipeline)
    return PromptEncoder(pipeline, 9, cache, **options)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that text encoders were loaded."""
    counted: list[int] = []
    original = text_module.load_text_encoders

    def load(*arguments: object) -> object:
        counted.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(text_module, "load_text_encoders", load)
    return counted


def test_text_encoders_come_for_what_is_missing_and_leave(tmp_path: Path, random_pipeline: Path, loads: list) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    listed = [Prompt(text) for text in prompts]
    first = make_encoder(random_pipeline, make_cache(tmp_path))
    assert first.prepare(listed) == (
        "prompts, the empty one with them: 0 of 3 were encoded before, 3 now; the text encoders are unloaded again"
    )
    assert first.encoders is None and loads == [1]
    second = make_encoder(random_pipeline, make_cache(tmp_path))
    said = second.prepare(listed)
    empty = "prompts, the empty one with them: "
    assert said == f"{empty}3 of 3 were encoded before, 0 now; the text encoders need not be loaded"
    assert second.prepare([*listed, Prompt("")]) == said.replace(empty, "prompts: "), "who asks for it, counts it"
    assert torch.equal(second(prompts).gathered()["prompt"], first(prompts).gathered()["prompt"]) and loads == [1]
    for path in tmp_path.glob("*/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    third = make_encoder(random_pipeline, make_cache(tmp_path))
    assert torch.equal(third(prompts).gathered()["prompt"], first(prompts).gathered()["prompt"]) and loads == [1, 1]


def test_prompts_that_do_not_fit_are_encoded_when_they_are_needed(
    tmp_path: Path, random_pipeline: Path, loads: list
) -> None:
    """And the text encoders stay, instead of coming and going."""
    encoder = make_encoder(random_pipeline, make_cache(tmp_path, limit=20_000), memory_mib=0)
    prompts = [f"a {n}" for n in range(9)]
    said = encoder.prepare([Prompt(text) for text in prompts])
    assert said.endswith("the others do not all fit in the cache and are encoded when needed")
    plain = make_encoder(random_pipeline)
    for _ in range(2):
        assert torch.equal(encoder(prompts).gathered()["prompt"], plain(prompts).gathered()["prompt"])
    assert encoder.encoders is not None and loads == [1, 1], "once for each of the two"


def test_without_a_disk_memory_serves_the_run(random_pipeline: Path, loads: list) -> None:
    encoder = make_encoder(random_pipeline)
    encoder.prepare([Prompt("a cat")])
    assert encoder.encoders is None
    encoder(["a cat", ""])
    assert loads == [1]


def test_saving_gets_the_text_encoders_back(tmp_path: Path, random_pipeline: Path) -> None:
    encoder = make_encoder(random_pipeline)
    encoder.whole_pipeline().save_pretrained(tmp_path)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = (folder / part / "model.safetensors" for folder in (tmp_path, random_pipeline))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "tokenizer_3").exists() and encoder.encoders is None


def test_text_encoders_that_do_not_fit_pass_layer_by_layer(
    tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same embeddings, with weights that are nowhere between two layers; they are whole again where they are saved.

    Here the CPU stands for the GPU."""
    plain = make_encoder(random_pipeline)(["a cat", ""])
    load = text_module.load_text_encoders

    def load_as_on_a_small_gpu(pipeline: Any, device: torch.device, *others: Any) -> Any:
        whole = load(pipeline, device, *others)
        for module in text_encoders(whole):
            cpu_offload(module, device)
        return whole

    monkeypatch.setattr(text_module, "load_text_encoders", load_as_on_a_small_gpu)
    encoder = make_encoder(random_pipeline, make_cache(tmp_path))
    found = encoder(["a cat", ""])
    assert all(torch.equal(rows, plain.rows[name]) for name, rows in found.rows.items())
    assert all(weight.is_meta for module in text_encoders(encoder.encoders) for weight in module.parameters())
    monkeypatch.setattr(text_module, "load_text_encoders", load)
    encoder.whole_pipeline().save_pretrained(tmp_path / "saved")
    ours, theirs = (folder / "text_encoder_3/model.safetensors" for folder in (tmp_path / "saved", random_pipeline))
    assert ours.read_bytes() == theirs.read_bytes()
    assert "(which did not fit: they passed layer by layer) are unloaded again" in encoder.prepare([Prompt("a dog")])


@pytest.mark.parametrize("free", [0, 2**40])
def test_text_encoders_that_do_not_fit_are_known_before(
    free: int, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[str] = []
    monkeypatch.setattr(pipeline_module, "free_bytes", lambda device: free)
    monkeypatch.setattr(pipeline_module, "cpu_offload", lambda module, device, **_: placed.append("by layer"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: placed.append("whole") or self)
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    placed.clear()
    pipeline_module.load_text_encoders(pipeline, torch.device("cuda"), torch.float32)
    assert placed == ["whole" if free else "by layer"] * 3


def test_text_encoders_that_cannot_be_loaded_are_one_line(tmp_path: Path, random_pipeline: Path) -> None:
    model = shutil.copytree(random_pipeline, tmp_path / "model")
    (model / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^the text encoders in .*/model cannot be loaded: "):
        make_encoder(model)(["a cat"])


def test_a_model_is_known_by_the_content_of_its_text_encoders(
    tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its place or its times; what was read once is not read again; weights of the hub are not read at all."""
    model, cache = shutil.copytree(random_pipeline, tmp_path / "elsewhere"), tmp_path / "cache"
    digest = content_digest(random_pipeline, cache)
    assert content_digest(model, cache) == digest
    for path in model.glob("t*/*"):
        os.utime(path, (1e9, 1e9))
    assert content_digest(model, cache) == digest

    def unread(*arguments: object) -> None:
        raise AssertionError("a file was read again")

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", unread)
        assert content_digest(model, cache) == digest
    weights = model / "text_encoder_3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert content_digest(model, cache) != digest
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", unread)
        assert content_digest(model, cache) != digest


def test_the_scope_names_what_an_embedding_depends_on(random_pipeline: Path) -> None:
    make: Callable[[torch.dtype], object] = lambda dtype: load_pipeline(  # noqa: E731
        str(random_pipeline), revision=None, device=CPU, dtype=dtype, with_text=False
    )
    scopes = [
        cache_scope(make(torch.float32), 9, "encoders"),  # type: ignore[arg-type]
        cache_scope(make(torch.bfloat16), 9, "encoders"),  # type: ignore[arg-type]
        cache_scope(make(torch.float32), 10, "encoders"),  # type: ignore[arg-type]
        cache_scope(make(torch.float32), 9, "others"),  # type: ignore[arg-type]
    ]
    assert len({str(scope) for scope in scopes}) == 4
    assert scopes[0]["torch"] == torch.__version__ and "threads" in str(scopes[0]["device"])


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGPO_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dgpo_fast" / "prompts"
    monkeypatch.setenv("DGPO_FAST_CACHE", "/elsewhere")
    assert default_folder() == Path("/elsewhere")
