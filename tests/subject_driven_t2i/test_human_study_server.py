"""The pages: what a rater sees and does, that they stay blind, and what the server refuses."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import multiprocessing
import random
import re
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image

from moslora_core.errors import UserError
from subject_driven_t2i.human_study import server, store
from subject_driven_t2i.human_study.server import LOOPBACK, MAX_BODY, create_app, serve
from subject_driven_t2i.human_study.study import read_study

from .study_runs import RED, SIZE, SUBJECTS, place_study

PAIRS = 6  # two subjects, two prompts each, two checks
QUESTIONS = ("subject_similarity", "prompt_consistency")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return place_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def folder(made):
    (made / store.VOTES_FILE).unlink(missing_ok=True)
    return made


@pytest.fixture
def client(folder):
    return create_app(folder).test_client()


def begin(client) -> str:
    """Begins a rater; returns the address of their pages."""
    answer = client.post("/raters", json={})
    assert answer.status_code == 201
    return answer.json["page"]


def vote(client, page, number, question, choice, **headers):
    return client.post(f"{page}/{number}/votes", json={"question": question, "choice": choice}, headers=headers)


def answer_pair(client, page, number, choice="left"):
    for question in QUESTIONS:
        assert vote(client, page, number, question, choice).status_code == 204


def votes(folder):
    with sqlite3.connect(folder / store.VOTES_FILE) as connection:
        return connection.execute("SELECT * FROM votes").fetchall()


def colour_of(client, address):
    with Image.open(io.BytesIO(client.get(address).data)) as image:
        return image.getpixel((SIZE[0] // 2, SIZE[1] // 2))


def line_of(answer) -> str:
    text = answer.get_data(as_text=True)
    assert answer.mimetype == "text/plain" and text.count("\n") == 1 and len(text) > 2
    return text.strip()


# ------------------------------------------------------------------------------------------------------- going through


def test_a_rater_goes_from_pair_to_pair(client, folder):
    page = begin(client)
    for number in range(1, PAIRS + 1):
        assert client.get(page).headers["Location"] == f"{page}/{number}"
        shown = client.get(f"{page}/{number}").get_data(as_text=True)
        assert f"Pair {number} of {PAIRS}" in shown and f'value="{number - 1}" max="{PAIRS}"' in shown
        assert ("Back" in shown) == (number > 1)
        answer_pair(client, page, number)
    assert client.get(page).headers["Location"] == f"{page}/done"
    assert page.removeprefix("/rate/") in client.get(f"{page}/done").get_data(as_text=True)
    assert len(votes(folder)) == 2 * PAIRS


def test_nobody_goes_ahead_of_the_open_pair(client):
    page = begin(client)
    assert client.get(f"{page}/2").headers["Location"] == page
    assert client.get(f"{page}/done").headers["Location"] == page
    vote(client, page, 1, QUESTIONS[0], "tie")  # one question of two
    assert client.get(f"{page}/2").headers["Location"] == page
    vote(client, page, 1, QUESTIONS[1], "tie")
    assert client.get(f"{page}/2").status_code == 200 and client.get(f"{page}/1").status_code == 200


def test_answers_are_there_again_after_going_back(client):
    page = begin(client)
    vote(client, page, 1, QUESTIONS[0], "left")
    vote(client, page, 1, QUESTIONS[1], "right")
    vote(client, page, 1, QUESTIONS[0], "tie")
    shown = client.get(f"{page}/1").get_data(as_text=True)
    chosen = re.findall(r'name="(\w+)" value="(\w+)"[^>]*checked', shown)
    assert chosen == [(QUESTIONS[0], "tie"), (QUESTIONS[1], "right")]


def test_a_code_leads_back(client):
    page = begin(client)
    code = page.removeprefix("/rate/")
    for written in (code, f" {code.upper()} ", f"{code[:4]}-{code[4:]}"):
        assert client.get("/rate", query_string={"code": written}).headers["Location"] == page
    answer = client.get("/rate", query_string={"code": "<b>"})
    assert answer.status_code == 404 and "Nobody has this code" in answer.get_data(as_text=True)
    assert "<b>" not in answer.get_data(as_text=True)


def test_images_are_those_of_the_raters_own_sides(client, folder):
    study = read_study(folder)
    pairs = {pair.id: pair for pair in study.pairs}
    seen = set()
    for rater in range(1, 5):
        page = begin(client)
        for number, screen in enumerate(store.screens_of(folder, rater), start=1):
            pair = pairs[screen.pair]
            left, right = (colour_of(client, f"{page}/{number}/{side}.png") for side in ("left", "right"))
            if pair.kind == "pair":
                first, second = (right, left) if screen.swapped else (left, right)
                assert (first[0], second[0]) == (RED["moslora"], RED["lora"]) and first[1:] == second[1:]
                seen.add((pair.id, screen.swapped))
            green = 10 + 40 * list(SUBJECTS).index(pair.subject)
            assert colour_of(client, f"{page}/{number}/reference-1.png")[:2] == (0, green)
    assert len(seen) > 4  # some pair was seen on both sides


# --------------------------------------------------------------------------------------------------------------- blind


def test_nothing_that_is_sent_names_a_method_or_a_file(client, folder):
    study = read_study(folder)
    page = begin(client)
    files = [name for pair in study.pairs for name in pair.images]
    forbidden = re.compile(rf"lora|sks|first|second|seed|noise|runs/|{'|'.join(files)}", re.IGNORECASE)
    for number in range(1, PAIRS + 1):
        answer = client.get(f"{page}/{number}")
        text = answer.get_data(as_text=True)
        assert answer.status_code == 200 and not forbidden.search(text + str(answer.headers))
        addresses = re.findall(r'(?:src|href|data-\w+)="([^"]+)"', text)
        assert len([address for address in addresses if address.endswith(".png")]) == 5
        for address in addresses:
            if not address.startswith("/static/"):
                assert re.fullmatch(rf"{page}/(\d+|done|\d+/(left|right|votes|reference-[123])(\.png)?)|\d", address)
        for side in ("left", "right"):
            answer = client.get(f"{page}/{number}/{side}.png")
            assert not forbidden.search(str(answer.headers)) and b"lora" not in answer.data
        answer_pair(client, page, number)
    for address in ("/", f"{page}/done", "/static/pair.js", "/static/start.js", "/static/page.css"):
        assert not re.search("lora|mixer|adapter", client.get(address).get_data(as_text=True), re.IGNORECASE)


def test_both_images_of_a_pair_are_sent_alike(client, folder):
    page = begin(client)
    pairs = {pair.id: pair.kind for pair in read_study(folder).pairs}
    for number, screen in enumerate(store.screens_of(folder, 1), start=1):
        answers = [client.get(f"{page}/{number}/{side}.png") for side in ("left", "right")]
        headers = [dict(answer.headers) for answer in answers]
        lengths = [int(entry.pop("Content-Length")) for entry in headers]
        assert headers[0] == headers[1] and headers[0]["Cache-Control"] == "no-store"
        assert not {"ETag", "Last-Modified", "Content-Disposition"} & set(headers[0])
        images = [Image.open(io.BytesIO(answer.data)) for answer in answers]
        assert {(image.format, image.mode, image.size) for image in images} == {("PNG", "RGB", SIZE)}
        if pairs[screen.pair] == "same":
            assert answers[0].data == answers[1].data and lengths[0] == lengths[1]


def test_pages_need_nothing_from_elsewhere(client):
    page = begin(client)
    for address in ("/", f"{page}/1"):
        answer = client.get(address)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "//" not in re.sub("<!doctype html>", "", answer.get_data(as_text=True))
        for asset in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.get_data(as_text=True)):
            assert client.get(asset).status_code == 200
        assert not re.search(r"<script(?! src)|<style| style=| onclick=", answer.get_data(as_text=True))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/%2e%2e/study.json",
        "/study.json",
        "/votes.sqlite",
        "/images/x.png",
        "{page}/1/..%2f..%2fstudy.json",
        "{page}/1/../../study.json",
        "{page}/1/left.png/../../../study.json",
        "{page}/1/reference-..%2f1.png",
        "{page}/1/reference-0.png",
        "{page}/1/reference-4.png",
        "{page}/1/middle.png",
        "{page}/0/left.png",
        "{page}/7/left.png",
        "{page}/-1/left.png",
        "{page}/7",
        "/rate/nobody12",
        "/rate/nobody12/1",
        "/rate/nobody12/1/left.png",
        "/rate/nobody12/done",
        "/rate/..%2f..%2fetc%2fpasswd/1/left.png",
    ],
)
def test_nothing_but_the_studys_own_images_is_sent(client, folder, path):
    answer = client.get(path.format(page=begin(client)))
    assert answer.status_code == 404
    assert line_of(answer)


@pytest.mark.parametrize(
    ("number", "body", "status", "expected"),
    [
        (7, {"question": QUESTIONS[0], "choice": "left"}, 404, "no pair 7: expected 1 to 6"),
        (0, {"question": QUESTIONS[0], "choice": "left"}, 404, "no pair 0: expected 1 to 6"),
        (1, {"question": "beauty", "choice": "left"}, 400, "question: expected one of subject_similarity"),
        (1, {"question": [], "choice": "left"}, 400, "question: expected one of subject_similarity"),
        (1, {"question": QUESTIONS[0], "choice": "up"}, 400, "choice: expected one of left, tie, right"),
        (1, {"question": QUESTIONS[0], "choice": {"a": 1}}, 400, "choice: expected one of left, tie, right"),
        (1, {"question": QUESTIONS[0]}, 400, "expected a JSON object with question and choice"),
        (1, {"question": QUESTIONS[0], "choice": "left", "rater": 2}, 400, "expected a JSON object"),
        (1, ["left"], 400, "expected a JSON object with question and choice"),
    ],
)
def test_a_vote_on_something_else_is_refused_in_a_line(client, folder, number, body, status, expected):
    page = begin(client)
    answer = client.post(f"{page}/{number}/votes", json=body)
    assert answer.status_code == status and line_of(answer).startswith(expected)
    assert votes(folder) == []


def test_a_vote_of_nobody_is_refused(client, folder):
    answer = vote(client, "/rate/nobody12", 1, QUESTIONS[0], "left")
    assert answer.status_code == 404 and line_of(answer) == "no rater has this code"
    assert votes(folder) == []


@pytest.mark.parametrize("place", ["/raters", "{page}/1/votes"])
def test_another_sites_page_can_do_nothing(client, folder, place):
    place = place.format(page=begin(client))
    body = '{"question": "subject_similarity", "choice": "left"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post(place, data=body, content_type=kind).status_code == 415
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        answer = client.post(place, data=body, content_type="application/json", headers=headers)
        assert answer.status_code == 403 and line_of(answer)
    assert votes(folder) == []
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert client.post(place, data=body, content_type="application/json", headers=own).status_code < 300


def test_a_page_that_another_name_leads_to_this_machine_is_refused(folder):
    client = create_app(folder, LOOPBACK[:2]).test_client()
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    answer = client.get("/", headers={"Host": "evil.example:8000"})
    assert answer.status_code == 400 and line_of(answer)


def test_a_body_that_is_too_long_is_refused(client, folder):
    page = begin(client)
    answer = client.post(f"{page}/1/votes", data="x" * (MAX_BODY + 1), content_type="application/json")
    assert answer.status_code == 413 and line_of(answer)
    answer = client.post(f"{page}/1/votes", data="{" * 1000, content_type="application/json")
    assert answer.status_code == 400 and line_of(answer)
    assert votes(folder) == []


@pytest.mark.parametrize(("method", "place"), [("delete", "{page}/1"), ("put", "{page}/1/votes"), ("get", "/raters")])
def test_nothing_is_taken_but_votes(client, method, place):
    answer = getattr(client, method)(place.format(page=begin(client)))
    assert answer.status_code == 405 and line_of(answer) and answer.headers["Allow"]


def test_a_full_study_says_so(client, monkeypatch):
    monkeypatch.setattr(store, "MOST_RATERS", 1)
    begin(client)
    answer = client.post("/raters", json={})
    assert answer.status_code == 503 and line_of(answer) == "this study takes no more raters"


def test_a_full_disk_is_told_in_a_line_and_costs_no_vote_that_was_taken(client, folder, caplog, monkeypatch):
    connect = sqlite3.connect

    def connect_full(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 1")  # for SQLite: no more pages than there are
        return connection

    page = begin(client)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_full)
        taken = []
        for choice in itertools.cycle(store.CHOICES):  # until the last page is full
            answer = vote(client, page, 1, QUESTIONS[0], choice)
            if answer.status_code != 204:
                break
            taken.append(choice)
        assert answer.status_code == 503 and "please try again" in line_of(answer) and str(folder) not in answer.text
        assert [record.message for record in caplog.records] == [
            f"not answered: {folder / store.VOTES_FILE}: database or disk is full; "
            "expected the votes of a study, in a folder that can be written"
        ]
        assert caplog.records[0].exc_info is None
        assert [row[3] for row in votes(folder)] == taken[-1:]
    assert vote(client, page, 1, QUESTIONS[0], choice).status_code == 204  # there is room again
    assert [row[3] for row in votes(folder)] == [choice]


def test_damage_that_comes_while_serving_is_told_in_a_line(client, folder, caplog):
    page = begin(client)
    (folder / store.VOTES_FILE).write_bytes(b"no database" * 1000)
    for answer in (client.get(f"{page}/1"), vote(client, page, 1, QUESTIONS[0], "left")):
        assert answer.status_code == 503 and line_of(answer)
    assert ["file is not a database" in record.message for record in caplog.records] == [True, True]


# ------------------------------------------------------------------------------------------------------------- serving


def served(monkeypatch, folder, **given):
    """What the server is created with, without serving."""
    made = {}

    class Server:
        effective_port = "4242"

        def run(self):
            made["ran"] = True

    def create(app, **settings):
        made.update(settings, app=app)
        return Server()

    monkeypatch.setattr(server, "create_server", create)
    serve(folder, **given)
    return made


def test_only_this_machine_is_listened_to_unless_told_otherwise(monkeypatch, folder, caplog):
    made = served(monkeypatch, folder)
    assert made["host"] == "127.0.0.1" and made["ran"] and made["app"].config["TRUSTED_HOSTS"]
    assert "can take part" not in caplog.text
    made = served(monkeypatch, folder, host="0.0.0.0")
    assert made["host"] == "0.0.0.0" and "everyone who reaches this machine at port 4242 can take part" in caplog.text


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()


@contextmanager
def serving(folder, address):
    """A server in a process of its own, which is killed at the end."""
    process = multiprocessing.get_context("fork").Process(target=serve, args=(folder, *address), daemon=True)
    process.start()
    try:
        for _ in range(600):
            try:
                socket.create_connection(address).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.join()


@pytest.fixture
def address(folder):
    """Host and port of a server in a process of its own."""
    found = free_address()
    with serving(folder, found):
        yield found


def ask(address, method, path, body=None, **headers):
    """Status, headers and content of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_server_itself_sends_nothing_else_and_takes_raters_at_once(folder, address):
    for path in ("/../../study.json", "/static/../../study.json", "/static//etc/passwd", "//etc/passwd", "/%00"):
        status, headers, content = ask(address, "GET", path)
        assert status in (308, 400, 404) and b"schema_version" not in content and b"root" not in content
    assert ask(address, "GET", "/", Host="evil.example")[0] == 400
    assert ask(address, "POST", "/raters", b"x" * 100_000)[0] == 413
    status, headers, _ = ask(address, "GET", "/static/pair.js")
    assert status == 200 and "Server" not in headers and headers["Cache-Control"] == "no-store"

    def rate(_):
        page = json.loads(ask(address, "POST", "/raters", b"{}")[2])["page"]
        for number in range(1, PAIRS + 1):
            for question in QUESTIONS:
                body = json.dumps({"question": question, "choice": "tie"})
                assert ask(address, "POST", f"{page}/{number}/votes", body)[0] == 204
        return page

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(rate, range(3)))) == 3
    assert len(votes(folder)) == 3 * PAIRS * 2


class Rater(threading.Thread):
    """Answers every pair that the server leads to, and sends again what was not acknowledged."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address = address
        self.page = json.loads(self.ask("POST", "/raters", b"{}")[2])["page"]
        self.taken = []  # (number of the pair, question) of what was acknowledged, in order
        self.start()

    def ask(self, method, path, body=None):
        while True:
            try:
                return ask(self.address, method, path, body)
            except (OSError, http.client.HTTPException):
                time.sleep(0.005)

    def run(self):
        while not (place := self.ask("GET", self.page)[1]["Location"]).endswith("/done"):
            for question in QUESTIONS:
                body = json.dumps({"question": question, "choice": "left"})
                if self.ask("POST", f"{place}/votes", body)[0] == 204:
                    self.taken.append((int(place.rsplit("/", 1)[1]), question))


def test_kills_cost_no_vote_and_no_rater_their_place(folder):
    address, moments, raters = free_address(), random.Random(0), []
    for kill in range(1, 6):
        with serving(folder, address):
            raters = raters or [Rater(address) for _ in range(3)]
            while sum(len(rater.taken) for rater in raters) < 6 * kill:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
    with serving(folder, address):
        for rater in raters:
            rater.join(60)
    # Had a vote been lost, its rater would have been led back to it.
    everything = [(number, question) for number in range(1, PAIRS + 1) for question in QUESTIONS]
    assert [rater.taken for rater in raters] == [everything] * 3
    kept = store.all_votes(folder, QUESTIONS)
    assert [(vote.rater, vote.position, vote.question) for vote in kept] == [
        (rater, *answer) for rater in range(1, 4) for answer in everything
    ]
    assert all((vote.choice, vote.changes) == ("left", 0) for vote in kept), "none counts twice"


def test_two_servers_of_one_study_share_its_votes(folder):
    addresses = [free_address() for _ in range(2)]
    with serving(folder, addresses[0]), serving(folder, addresses[1]):
        raters = [Rater(address) for address in addresses * 2]
        for rater in raters:
            rater.join(60)
        assert {ask(address, "GET", raters[0].page)[1]["Location"] for address in addresses} == {
            f"{raters[0].page}/done"
        }
    assert len({rater.page for rater in raters}) == 4
    assert len(store.all_votes(folder, QUESTIONS)) == 4 * PAIRS * 2


def test_an_address_that_is_taken_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1 port {port}: .*choose another --port"):
            serve(folder, port=port)
    with pytest.raises(UserError, match=r"cannot listen at no.such.host.invalid"):
        serve(folder, host="no.such.host.invalid")
