"""``arf caption --captioner-url``: the stage on a small server in this process, and on ``transformers serve``."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.building import drawing, folder_bytes, save_tiny_vlm
from support.building_fixtures import Inputs
from support.chat_servers import SmallChat, transformers_serve
from support.environments import ROOT
from support.knn_servers import JSON

from arf_plugin.pipeline.captioner import PROMPT


def command(inputs: Inputs, url: str, out: Path, *more: object) -> list[str]:
    words = [
        "caption",
        "--task-data",
        inputs.task,
        "--captioner",
        "tiny",
        "--captioner-url",
        url,
        "--out",
        out,
    ]
    return [str(word) for word in (*words, *more)]


def captions_of(anchors: Path) -> list[tuple[str, str]]:
    parts = sorted((anchors / "captions").glob("part-*.parquet"))
    return [(row["id"], row["caption"]) for part in parts for row in pq.read_table(part).to_pylist()]


def test_every_image_gets_what_the_server_says_of_it(arf, inputs: Inputs, tmp_path: Path):
    with SmallChat(pause=0.2) as server:
        arf(
            *command(
                inputs, server.url, tmp_path / "A", "--score-model", inputs.clip, "--captioner-threads", 4
            )
        )
        assert 1 < server.most_at_once <= 4
        assert {request["messages"][0]["content"][1]["text"] for request in server.requests} == {PROMPT}
    found = captions_of(tmp_path / "A")
    assert [row[0] for row in found] == [f"{i // 7:03d}/{i:05d}" for i in range(21)]
    for index, (_, caption) in enumerate(found):
        middle = Image.open(io.BytesIO(drawing(index))).getpixel((16, 16))
        assert caption == "a drawing in #" + "".join(f"{value:02x}" for value in middle)
    manifest = json.loads((tmp_path / "A/anchors.json").read_text())["captions"]
    assert (manifest["captioner"], manifest["generation"]["prompt"]) == ("tiny", PROMPT)
    assert "127.0.0.1" not in str(folder_bytes(tmp_path / "A"))


def test_another_server_goes_on_where_the_first_one_failed(arf, inputs: Inputs, tmp_path: Path):
    """Elsewhere, with other limits; another model there is another captioner."""
    seen = iter(range(100))
    with SmallChat(lambda q, r: r if next(seen) < 12 else (403, JSON, b'{"error": "quota"}')) as server:
        _, err = arf(*command(inputs, server.url, tmp_path / "A"), status=1)
    assert "quota" in err and len(list((tmp_path / "A/captions").glob("*.parquet"))) == 1
    with SmallChat() as server:
        arf(*command(inputs, f"{server.url}/v1/", tmp_path / "A", "--captioner-threads", 1))
        assert (
            len(server.requests) == 15 and server.most_at_once == 1
        )  # two of three shards, and the first one
        arf(*command(inputs, server.url, tmp_path / "B"))
        assert folder_bytes(tmp_path / "A") == folder_bytes(tmp_path / "B")
        _, err = arf(*command(inputs, server.url, tmp_path / "A", "--captioner", "large"), status=1)
    assert "endpoint:tiny" in err and "endpoint:large" in err


def test_an_image_that_the_server_refuses_is_listed(arf, inputs: Inputs, tmp_path: Path):
    odd = base64.b64encode(drawing(3)).decode()
    refused = (400, JSON, b'{"message": "of another planet"}')
    with SmallChat(lambda q, r: refused if odd in str(q) else r) as server:
        arf(*command(inputs, server.url, tmp_path, "--max-bad-fraction", 0.1))
    (reject,) = map(json.loads, (tmp_path / "work/caption/rejects.jsonl").read_text().splitlines())
    assert reject["id"] == "000/00003" and "of another planet" in reject["reason"]
    assert len(captions_of(tmp_path)) == 20


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_it_ends_with_the_same_bytes(inputs: Inputs, tmp_path: Path, kills: int):
    more = ("--top-p", 0.9, "--captions-per-image", 2, "--captioner-threads", 3)
    with SmallChat(pause=0.05) as server:
        runs = [(0, command(inputs, server.url, tmp_path / "whole", *more))]
        runs += [(kills, command(inputs, server.url, tmp_path / "killed", *more))]
        done = subprocess.run(
            [sys.executable, "-m", "support.kill_and_resume", "0"],
            input=json.dumps(runs),
            capture_output=True,
            text=True,
            cwd=ROOT / "tests",
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == kills
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")
    assert len(captions_of(tmp_path / "killed")) == 42


def test_ctrl_c_does_not_wait_for_a_server_that_is_silent(inputs: Inputs, tmp_path: Path):
    """Requests are under way, with limits that are longer than this test may take."""
    asked, end = threading.Event(), threading.Event()
    first = iter([True])

    def silent(request, reply):
        if next(first, False):  # the check at the start
            return reply
        asked.set()
        end.wait()
        return None

    with SmallChat(silent) as server:
        limits = ("--captioner-timeout", 10_000, "--captioner-patience", 10_000)
        words = [sys.executable, "-m", "arf_plugin.cli.main", *command(inputs, server.url, tmp_path, *limits)]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            assert asked.wait(120)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
            assert process.returncode in (130, -signal.SIGINT)
        finally:
            process.kill()
            process.wait()
            end.set()


def test_what_cannot_work_is_said_before_anything_is_asked(arf, inputs: Inputs, tmp_path: Path):
    with SmallChat() as server:
        for more, expected in (
            (("--num-beams", 3), "--num-beams"),
            (("--captions-per-image", 2), "--top-p"),
            (("--captioner-timeout", 0), "--captioner-timeout 0: expected seconds"),
        ):
            _, err = arf(*command(inputs, server.url, tmp_path / "A", *more), status=1)
            assert expected in err
        _, err = arf("anchors", "--train-data", inputs.task, "--captioner-url", server.url, "--out", tmp_path / "A",
                     status=1)  # fmt: skip
        assert "--captioner-url needs --captioner" in err
        arf(*command(inputs, server.url, tmp_path / "A", "--dry-run"))
        assert not server.requests and not (tmp_path / "A").exists()


def test_anchors_and_fit_take_an_endpoint(arf, inputs: Inputs, tmp_path: Path):
    """The fit ends at its captions, with the server's words; its settings are those of a file."""
    for index in range(12):
        path = tmp_path / "images" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawing(index))
    fit = tmp_path / "fit.yaml"
    with SmallChat() as server:
        words = ("--captioner", "tiny", "--captioner-url", server.url, "--no-features")
        arf("anchors", "--train-data", inputs.task, *words, "--out", tmp_path / "A")
        assert len(captions_of(tmp_path / "A")) == 21
        server.requests.clear()
        server.change = lambda q, r: (403, JSON, b'{"error": "quota"}')
        fit.write_text(
            f"images: {tmp_path / 'images'}\nmodel: {inputs.clip}\nout: {tmp_path / 'fit'}\n"
            f"captioner: tiny\ncaptioner_url: {server.url}\ncaptioner_prompt: Which shape?\n"
        )
        _, err = arf("fit", "--config", fit, status=1)
    assert "quota" in err and "--captioner-url" in err
    assert [request["messages"][0]["content"][1]["text"] for request in server.requests] == ["Which shape?"]
    _, err = arf("fit", "--config", fit, "--captioner-url", "127.0.0.1:8000", status=1)
    assert "expected an address such as" in err
    _, err = arf("fit", "--config", fit, "--captioner", "none", status=1)
    assert "--captioner-url needs --captioner" in err


@pytest.mark.slow
def test_transformers_serve_says_what_the_same_model_says_here(arf, inputs: Inputs, tmp_path: Path):
    model = save_tiny_vlm(tmp_path / "vlm")
    common = ("caption", "--task-data", inputs.task, "--captioner", model, "--prompt", "a white",
              "--max-new-tokens", 6, "--raw-captions")  # fmt: skip
    with transformers_serve(model, tmp_path / "log") as url:
        arf(*common, "--captioner-url", url, "--out", tmp_path / "served")
        _, err = arf(
            *common, "--captioner-url", url, "--captioner", "other", "--out", tmp_path / "x", status=1
        )
        assert "answered 400" in err and "'other'" in err
    arf(*common, "--out", tmp_path / "here")
    assert captions_of(tmp_path / "served") == captions_of(tmp_path / "here")
    assert len({caption for _, caption in captions_of(tmp_path / "here")}) > 10
