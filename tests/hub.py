"""A stand-in for the Hugging Face hub: as much of its API as a new model takes."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.servers import answering

TOKEN = "hf_of_the_tests"
TAKEN = "me/taken"


@dataclass
class Hub:
    """What was sent to it.

    Attributes:
        url: its address.
        models: files of each model by their names.
        private: models that are.
        cards: metadata of the cards that it was asked to check; one without a licence is refused.
        refuses: paths that it answers with an error of this text.
    """

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=lambda: {TAKEN: {}})
    private: set[str] = field(default_factory=set)
    cards: list[dict[str, Any]] = field(default_factory=list)
    refuses: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, path: str, body: bytes, handler: Any) -> Any:
        refused = next((text for start, text in self.refuses.items() if path.startswith(start)), None)
        if refused is not None:
            return 403, {"error": refused}
        if path == "/api/validate-yaml":
            return self._check(json.loads(body)["content"])
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return b""
        if handler.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = next((name for name in self.models if f"/{name}" in path), None)
        if name is None:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "RepoNotFound")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": file, "uploadMode": _mode(file), "shouldIgnore": False} for file in files]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.url}/large/{one['oid']}"}} for one in objects]
            return {"objects": [one | {"actions": action} for one, action in zip(objects, actions, strict=True)]}
        if "/commit/" in path:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return {"id": name, "private": name in self.private, "tags": [], "siblings": []}

    def _check(self, card: str) -> Any:
        self.cards.append(yaml.safe_load(card.split("---")[1]))
        return {} if "license" in self.cards[-1] else (400, b'{"error": "license is required"}')

    def _create(self, wanted: dict[str, Any]) -> Any:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.models:
            return 409, {"error": "You already created this model repo"}
        self.models[name] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        return {"url": f"{self.url}/{name}", "id": "1"}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> Any:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.models[name][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.models[name][value["path"]] = self.large[value["oid"]]
                assert hashlib.sha256(self.large[value["oid"]]).hexdigest() == value["oid"]
        return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}


def _mode(file: str) -> str:
    return "lfs" if file.endswith((".safetensors", ".png")) else "regular"


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """One that runs, of this process."""
    hub = Hub()
    with answering(lambda path, body, handler: hub.answer(path, body, handler)) as url:
        hub.url = url
        yield hub
