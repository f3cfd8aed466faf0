"""The command line against a gateway that answers from a script."""

import http.server
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.cli.gateway_client import Gateway, GatewayError, Snapshot
from services.cli.main import main
from services.cli.show import save_pictures, show_progress

KEY = "lk_test"
JOB = "job-1"


@dataclass
class Script:
    """What the gateway answers, and what it was asked."""

    statuses: list[dict[str, Any]] = field(default_factory=list)
    refusal: tuple[int, Any] | None = None
    asked: list[tuple[str, str, str, Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        self.asked.append((method, path, key, json.loads(body) if body else None))
        if self.refusal is not None:
            status, said = self.refusal
            return status, said if isinstance(said, bytes) else json.dumps(said).encode()
        if path.startswith("/files/"):
            return 200, b"picture"
        return 200, json.dumps(self._body(path)).encode()

    def _body(self, path: str) -> Any:
        if path == "/readyz":
            return {"ready": True}
        if path.endswith("/run"):
            return {"id": JOB, "status": "IN_QUEUE"}
        if path.endswith("/health"):
            return {"jobs": {"inQueue": 2}, "workers": {"idle": 1}}
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Script]:
    script = Script(statuses=[running("training", 3, 10), completed("http://unset")])

    class Handler(http.server.BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization", "")
            status, said = script.answer(self.command, self.path, key, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = _any

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    script.statuses[-1] = completed(script.url)
    monkeypatch.setenv("LIKENESS_URL", script.url)
    monkeypatch.setenv("LIKENESS_API_KEY", KEY)
    monkeypatch.setenv("LIKENESS_HOME", str(tmp_path))
    monkeypatch.setattr("services.cli.gateway_client.POLL_S", 0.01)
    yield script
    server.shutdown()
    server.server_close()


def running(stage: str, step: int, total: int) -> dict[str, Any]:
    progress = {
        "stage": stage,
        "step": step,
        "total_steps": total,
        "percent": 100 * step / total,
        "loss": 0.5,
    }
    return {"id": JOB, "status": "IN_PROGRESS", "output": {"progress": progress}}


def completed(url: str) -> dict[str, Any]:
    images = [{"image": f"{url}/files/token/0-0.png", "seed": 7}]
    return {"id": JOB, "status": "COMPLETED", "output": images}


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["likeness", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_train_submits_follows_and_saves_the_pictures(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "photo of zkw dog", "--class-prompt", "photo of a dog", "--sample", "zkw at sea"]
    assert call(monkeypatch, "train", "http://x/a.zip", *words, "--out", str(tmp_path / "out")) == 0
    method, path, key, body = script.asked[0]
    assert (method, path, key) == ("POST", "/v2/dream-booth-v1/run", f"Bearer {KEY}")
    assert body["input"]["concepts"][0] == {
        "instance_data": "http://x/a.zip",
        "instance_prompt": "photo of zkw dog",
        "class_prompt": "photo of a dog",
        "num_class_images": 50,
    }
    assert body["input"]["samples"] == [{"prompt": "zkw at sea"}]
    picture = tmp_path / "out" / "00-seed-7.png"
    assert picture.read_bytes() == b"picture"
    assert str(picture) in capsys.readouterr().out


def test_a_refusal_names_every_fault_and_ends_with_status_1(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.refusal = (400, {"error": "invalid input", "details": ["resolution: bad", "samples: missing"]})
    assert call(monkeypatch, "jobs", "show", JOB) == 1
    said = capsys.readouterr().err
    assert "invalid input" in said
    assert "resolution: bad" in said
    assert "samples: missing" in said


def test_an_answer_that_is_not_json_is_told_by_its_status(script: Script) -> None:
    script.refusal = (502, b"<html>")
    with Gateway(script.url, KEY) as gateway, pytest.raises(GatewayError, match="502"):
        gateway.read(JOB)


def test_a_gateway_that_is_away_is_said_to_be_away() -> None:
    with Gateway("http://127.0.0.1:1") as gateway:
        assert not gateway.is_ready()
        with pytest.raises(GatewayError, match="is the platform up"):
            gateway.health()


def test_a_failed_job_ends_the_command_with_status_1(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.statuses = [{"id": JOB, "status": "FAILED", "error": "no readable image"}]
    assert call(monkeypatch, "jobs", "watch", JOB) == 1
    assert "FAILED: no readable image" in capsys.readouterr().out


def test_show_prints_json_when_asked(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "jobs", "show", JOB, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "IN_PROGRESS"


def test_cancel_posts_and_shows_the_job(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "jobs", "cancel", JOB) == 0
    assert script.asked[0][:2] == ("POST", f"/v2/dream-booth-v1/cancel/{JOB}")


def test_doctor_tells_the_figures(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "doctor") == 0
    assert "inQueue 2" in capsys.readouterr().out


def test_the_key_is_read_from_the_platforms_home(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LIKENESS_API_KEY")
    (tmp_path / "api-key").write_text("lk_file\n")
    assert call(monkeypatch, "jobs", "show", JOB) == 0
    assert script.asked[0][2] == "Bearer lk_file"


def test_following_waits_through_answers_that_do_not_come(script: Script) -> None:
    script.refusal = (503, {"error": "service unavailable"})
    with Gateway(script.url, KEY) as gateway:
        following = gateway.follow(JOB)
        threading.Timer(0.1, lambda: setattr(script, "refusal", None)).start()
        assert [snapshot.status for snapshot in following] == ["IN_PROGRESS", "COMPLETED"]


def test_following_an_unknown_job_ends_at_once(script: Script) -> None:
    script.refusal = (404, {"error": "job not found"})
    with Gateway(script.url, KEY) as gateway, pytest.raises(GatewayError, match="job not found"):
        next(gateway.follow(JOB))
    assert len(script.asked) == 1


def test_each_stage_gets_a_bar_that_fills() -> None:
    console = Console(file=io.StringIO(), width=100)
    snapshots = [Snapshot("IN_QUEUE", "", 0, {}, {})]
    for stage, step in (("training", 1), ("training", 9), ("sampling", 1)):
        body = running(stage, step, 10)
        progress = body["output"]["progress"]
        snapshots.append(Snapshot("IN_PROGRESS", stage, progress["percent"], progress, body))
    last = Snapshot("COMPLETED", "", 0, {}, {"status": "COMPLETED"})
    assert show_progress([*snapshots, last], console) is last
    file: Any = console.file
    text = file.getvalue()
    for word in ("waiting", "training", "sampling", "10/10"):
        assert word in text


def test_pictures_of_a_job_with_a_bucket_are_found_too(script: Script, tmp_path: Path) -> None:
    body = {"output": {"samples": completed(script.url)["output"], "tuned_model": "x"}}
    with Gateway(script.url, KEY) as gateway:
        [path] = save_pictures(gateway, Snapshot("COMPLETED", "", 0, {}, body), tmp_path)
    assert path.read_bytes() == b"picture"
