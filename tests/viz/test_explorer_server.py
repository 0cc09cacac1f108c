"""The explorer's server: who may ask, for what, and that nothing else is let in."""

import json
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

import lens_positions as lp
from lens_positions.viz.explorer import page as pages
from lens_positions.viz.explorer.engine import Explorer
from lens_positions.viz.explorer.server import MOST_BYTES, Models, Server, application, is_local

HOST = "127.0.0.1:8123"
TOKEN = "a secret"
STATE = {"model": "tiny", "text": "The cat"}
OWN = {"X-Explorer-Token": TOKEN, "Host": HOST}


@pytest.fixture
def client(tiny_model):
    model = tiny_model(source="per_layer")
    model.name = "tiny"
    return TestClient(application(Models([], [model]), TOKEN, [HOST]), base_url=f"http://{HOST}")


def test_a_question_is_answered_as_the_engine_answers_it(client, tiny_model):
    model = tiny_model(source="per_layer")
    model.name = "tiny"
    edit = {"kind": "gap", "token": 4, "by": 1.5}
    answer = client.post("/api/run", json=STATE | {"edits": [edit]}, headers=OWN)
    assert answer.status_code == 200
    expected = Explorer(model).run(STATE | {"edits": [edit]})
    assert {**answer.json(), "seconds": 0} == {**expected, "seconds": 0}
    assert client.post("/api/slopes", json=STATE, headers=OWN).json() == Explorer(model).slopes(STATE)
    still = client.post("/api/page", json=STATE, headers=OWN)
    assert still.text.startswith("<!doctype html>")


def test_the_page_and_its_files_come_from_the_package(client):
    shown = client.get("/", params={"token": TOKEN})
    assert shown.status_code == 200
    assert '"models":["tiny"]' in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    for name, kind in pages.FILES.items():
        found = client.get(f"/{name}")
        assert (found.status_code, found.text) == (200, pages.file(name))
        assert found.headers["content-type"].startswith(kind)


@pytest.mark.parametrize(
    "path", ["/explorer.html", "/../server.py", "/%2e%2e%2fserver.py", "/etc/passwd", "//etc/passwd"]
)
def test_no_other_file_is_served(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": HOST}, 403),
        ({"Host": HOST, "X-Explorer-Token": "another"}, 403),
        ({"Host": HOST, "X-Explorer-Token": ""}, 403),
        (OWN | {"Origin": "http://evil.example"}, 403),
        (OWN | {"Origin": "null"}, 403),
        (OWN | {"Origin": "http://127.0.0.1:9999"}, 403),
        (OWN | {"Origin": f"https://{HOST}"}, 403),
        (OWN | {"Host": "evil.example"}, 421),
        (OWN | {"Host": "127.0.0.1"}, 421),
        (OWN | {"Content-Type": "text/plain"}, 415),
        (OWN | {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_who_may_not_ask_gets_nothing(client, headers, status):
    kind = {"Content-Type": "application/json"} | headers
    for path in ("run", "slopes", "page"):
        answer = client.post(f"/api/{path}", content=json.dumps(STATE), headers=kind)
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_needs_the_token_and_the_host_too(client):
    assert client.get("/").status_code == 403
    assert client.get("/", params={"token": "another"}).status_code == 403
    assert client.get("/", params={"token": TOKEN}, headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/explorer.css", headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/api/run", headers=OWN).status_code == 405


def test_ten_megabytes_are_refused_before_they_are_read(client):
    answer = client.post("/api/run", json=STATE | {"text": "a" * 10_000_000}, headers=OWN)
    assert answer.status_code == 413
    assert f"{MOST_BYTES:,} bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        "../tiny",
        "tiny/",
        "bilingual-rope",
        "runs/model",
        "https://evil.example/model",
        "",
        None,
        ["tiny"],
        {},
        "a" * 10_000,
    ],
)
def test_no_model_but_those_that_were_named(client, name, monkeypatch):
    def load(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lp.HookedPositionTransformer, "from_pretrained", load)
    answer = client.post("/api/run", json=STATE | {"model": name}, headers=OWN)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith("expected one of tiny.")
    assert len(answer.json()["error"]) < 200


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '{"model":"tiny"}',
        "[" * 100_000,
        "9" * 5000,
        '{"model":"tiny","text":1e999}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_state_is_one_sentence_and_no_traceback(client, body):
    answer = client.post("/api/run", content=body, headers=OWN | {"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)
    assert list(answer.json()) == ["error"]
    assert "expected" in answer.json()["error"]


def test_hostile_text_is_data_in_every_answer(client):
    text = "</script><script>alert(1)</script>"
    assert client.post("/api/run", json=STATE | {"text": text}, headers=OWN).status_code == 200
    still = client.post("/api/page", json=STATE | {"text": text}, headers=OWN).text
    assert "<script>alert" not in still


def test_a_question_is_dropped_when_its_tab_asked_another(client):
    ask = {"X-Explorer-Tab": "one"}
    assert client.post("/api/run", json=STATE, headers=OWN | ask | {"X-Explorer-Serial": "7"}).json().get("key")
    late = client.post("/api/run", json=STATE, headers=OWN | ask | {"X-Explorer-Serial": "6"})
    assert late.json() == {"stale": True}
    other = client.post("/api/run", json=STATE, headers=OWN | {"X-Explorer-Tab": "two", "X-Explorer-Serial": "1"})
    assert other.json().get("key")


@pytest.mark.slow
def test_it_listens_on_this_machine_alone_and_draws_a_token_each_time(tiny_model):
    servers = [Server(Models([], [tiny_model()])) for _ in range(2)]
    try:
        assert all(server._socket.getsockname()[0] == "127.0.0.1" for server in servers)
        tokens = [server.address.partition("?token=")[2] for server in servers]
        assert len(set(tokens)) == 2
        assert min(map(len, tokens)) >= 32
        with pytest.raises(lp.PositionsError, match=f"cannot listen on 127.0.0.1 port {servers[0].port}"):
            Server(Models([], [tiny_model()]), port=servers[0].port)
    finally:
        for server in servers:
            server._socket.close()
    assert is_local("127.0.0.1")
    assert not is_local("0.0.0.0")


@pytest.mark.slow
def test_the_command_says_what_another_address_means(monkeypatch, capsys):
    from lens_positions.cli import main
    from lens_positions.viz.explorer import server

    monkeypatch.setattr(server.Server, "run", lambda self: self._socket.close())
    assert main(["explore", "bilingual-rope", "--no-open"]) == 0
    said = capsys.readouterr()
    assert "the explorer is at http://127.0.0.1:" in said.out
    assert said.err == ""
    assert main(["explore", "bilingual-rope", "--no-open", "--host", "0.0.0.0"]) == 0
    assert "listening on 0.0.0.0: whoever reaches this machine" in capsys.readouterr().err
    assert main(["explore", "no/such/model", "--no-open"]) == 2
    assert main(["explore", "--port", "70000"]) == 2


@pytest.mark.slow
def test_without_its_packages_the_sentence_says_which():
    code = (
        "import sys; sys.modules['uvicorn'] = None; from lens_positions.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, "explore", "--no-open"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "the explorer needs starlette and uvicorn" in ended.stderr
    assert ended.stderr.count("\n") == 1
