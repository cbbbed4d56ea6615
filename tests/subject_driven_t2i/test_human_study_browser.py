"""The whole study in a real browser: two raters, a reload and a killed server in the middle, and what was clicked."""

from __future__ import annotations

import csv
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from subject_driven_t2i.human_study.__main__ import main

from .study_runs import RED, SUBJECTS, place_runs

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import NoSuchElementException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--window-size=1280,800",
)
PATIENCE = 120  # seconds, for a machine that does much else
QUESTIONS = ("subject_similarity", "prompt_consistency")
PAIRS = 6
KEYS = {"left": 1, "tie": 2, "right": 3}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its chromedriver on this machine"),
]

# The colour in the middle of an image, as the browser shows it.
_COLOUR = """
const image = document.querySelectorAll("figure img")[arguments[0]];
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
const context = canvas.getContext("2d");
context.drawImage(image, 0, 0);
return [...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data].slice(0, 3);
"""


class Server:
    """The command that serves a study, in a process that can be killed."""

    def __init__(self, runs: Path):
        self.runs = runs
        self.port = "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "subject_driven_t2i.human_study", "serve", "--runs", str(self.runs)]
        command += ["--subjects", "rex", "fizz", "--seed", "1", "--prompts", "2", "--checks", "2"]
        command += ["--first", "method=moslora", "--second", "method=lora", "--port", self.port]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=lambda: [lines.put(line) for line in self.process.stderr], daemon=True)
        self.reader.start()
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", said)):
            try:
                said += lines.get(timeout=3 * PATIENCE)
            except queue.Empty:
                pytest.fail(f"the server did not start: {said}")
        self.port = found.group(1)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    started = Server(place_runs(tmp_path, ["rex", "fizz"]))
    yield started
    if started.process.poll() is None:
        started.kill()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Rater:
    """Someone in a tab of the browser, who remembers what they clicked in terms of what they saw."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        browser.get(url)
        self.find("#begin").click()
        self.wait(lambda: self.number() == 1)
        self.code = self.find(".code strong").text
        self.clicked: dict[tuple[str, str, str], str] = {}

    def turn(self) -> None:
        self.browser.switch_to.window(self.tab)

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition) -> None:
        waiting = WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[NoSuchElementException])
        waiting.until(lambda _: condition())

    def number(self) -> int | None:
        found = re.search(r"/rate/\w+/(\d+)$", self.browser.current_url)
        return int(found.group(1)) if found else None

    def radio(self, question: str, choice: str):
        return self.find(f"input[name={question}][value={choice}]")

    def chosen(self) -> dict[str, str]:
        checked = self.browser.find_elements(By.CSS_SELECTOR, "input:checked")
        return {entry.get_attribute("name"): entry.get_attribute("value") for entry in checked}

    def answer(self, question: str, choice: str, by_key: bool) -> None:
        """Answers and waits until it is kept."""
        self.ready()
        if by_key:
            key = KEYS[choice] + 3 * QUESTIONS.index(question)
            self.find("body").send_keys(str(key))
        else:
            self.radio(question, choice).click()
        self.wait(lambda: self.find("#state").text == "Saved" and self.chosen().get(question) == choice)
        self.note(question, choice)

    def ready(self) -> None:
        self.wait(lambda: self.radio(QUESTIONS[0], "tie").is_enabled())

    def note(self, question: str, choice: str) -> None:
        """What the choice means: the pixels say which method and subject drew an image, the text says the prompt."""
        sides = [self.browser.execute_script(_COLOUR, side) for side in range(2)]
        kinds = {red: method for method, red in RED.items()}
        drawn = [kinds.get(red) for red, _, _ in sides]
        greens = {10 + 40 * number: name for number, name in enumerate(SUBJECTS)}
        subjects = [greens[green] for _, green, _ in sides]
        description = self.find("h1").text.removeprefix("Description").strip()
        if drawn[0] is None:
            kind, names = "other", subjects
        elif drawn[0] == drawn[1]:
            kind, names = "same", ["same", "same"]
        else:
            kind, names = "pair", drawn
        self.clicked[kind, description, question] = {"left": names[0], "right": names[1], "tie": "tie"}[choice]

    def go_on(self, by_key: bool) -> None:
        number = self.number()
        self.wait(lambda: self.find("#next").is_enabled())
        if by_key:
            self.find("body").send_keys(Keys.ENTER)
        else:
            self.find("#next").click()
        self.wait(lambda: self.number() != number)


def choice_of(rater: int, number: int, question: str) -> str:
    return ("left", "tie", "right")[(rater + number + 2 * QUESTIONS.index(question)) % 3]


def rate(rater: Rater, which: int, by_key: bool) -> None:
    rater.turn()
    for question in QUESTIONS:
        rater.answer(question, choice_of(which, rater.number(), question), by_key)
    rater.go_on(by_key)


def rate_in_a_hurry(rater: Rater, which: int) -> None:
    """Three keys without a pause: no answer may be lost, and the page goes on when both are kept."""
    rater.turn()
    rater.ready()
    number = rater.number()
    choices = {question: choice_of(which, number, question) for question in QUESTIONS}
    for question, choice in choices.items():
        rater.note(question, choice)
    keys = [str(KEYS[choice] + 3 * QUESTIONS.index(question)) for question, choice in choices.items()]
    rater.find("body").send_keys(*keys, Keys.ENTER)
    rater.wait(lambda: rater.number() != number)


def exported(runs: Path) -> tuple[list[dict[str, str]], Path]:
    main(["export", "--runs", str(runs)])
    path = runs / "subject_driven_t2i/smoke/human_study/main/votes.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)], path


def test_two_raters_a_reload_a_killed_server_and_an_export_of_what_was_clicked(server, browser):
    one, two = Rater(browser, server.url), Rater(browser, server.url)
    assert one.code != two.code

    # Both go on in turn, one with keys, the other with the mouse; the next pair needs both answers.
    rate(one, 1, by_key=True)
    two.turn()
    two.ready()
    assert not two.find("#next").is_enabled()
    two.find("body").send_keys(Keys.ENTER)
    rate(two, 2, by_key=False)
    rate(one, 1, by_key=True)
    rate(two, 2, by_key=False)

    # A reload in the middle of a pair keeps its first answer.
    one.turn()
    one.answer(QUESTIONS[0], "right", by_key=True)
    browser.refresh()
    one.ready()
    assert one.number() == 3 and one.chosen() == {QUESTIONS[0]: "right"} and not one.find("#next").is_enabled()

    # While the server is dead no answer looks as if it were kept.
    server.kill()
    one.find("body").send_keys("4")
    one.wait(lambda: "Not saved: the server does not answer" in one.find("#error").text)
    assert one.chosen() == {QUESTIONS[0]: "right"} and not one.find("#next").is_enabled()
    server.start()
    one.answer(QUESTIONS[1], "left", by_key=True)
    assert not one.find("#error").is_displayed()
    one.go_on(by_key=True)

    # The other comes back with the code, to the pair that is open, goes back and changes an answer.
    two.turn()
    browser.get(server.url)
    two.find("#code").send_keys(two.code.upper())
    two.find("form button").click()
    two.wait(lambda: two.number() == 3)
    rate(two, 2, by_key=False)
    two.ready()
    two.find("body").send_keys(Keys.ARROW_LEFT)
    two.wait(lambda: two.number() == 3)
    before = two.chosen()
    assert before == {question: choice_of(2, 3, question) for question in QUESTIONS}
    changed = "tie" if before[QUESTIONS[1]] != "tie" else "left"
    two.answer(QUESTIONS[1], changed, by_key=False)
    two.go_on(by_key=False)

    for which, rater in ((1, one), (2, two)):
        rater.turn()
        rate_in_a_hurry(rater, which)
        while rater.number() is not None:
            rate(rater, which, by_key=which == 1)
        assert rater.find("h1").text == "Thank you" and rater.code in browser.page_source
    # But for the server's death nothing went wrong in the pages.
    assert all("ERR_CONNECTION_REFUSED" in entry["message"] for entry in browser.get_log("browser"))

    rows, _ = exported(server.runs)
    meaning = {"first": "moslora", "second": "lora", "tie": "tie"}
    for number, rater in (("001", one), ("002", two)):
        of_rater = [row for row in rows if row["rater"] == number]
        assert len(of_rater) == len(rater.clicked) == 2 * PAIRS
        found = {}
        for row in of_rater:
            winner = meaning[row["winner"]]
            if row["kind"] == "same" and winner != "tie":
                winner = "same"
            if row["kind"] == "other" and winner != "tie":
                other = next(name for name in ("rex", "fizz") if name != row["subject"])
                winner = row["subject"] if row["winner"] == "first" else other
            found[row["kind"], row["prompt"], row["question"]] = winner
        assert found == rater.clicked
    assert sum(int(row["changes"]) for row in rows) == 1
