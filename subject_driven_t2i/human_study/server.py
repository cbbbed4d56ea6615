"""The pages of a study: a rater begins or comes back with a code, sees pair after pair, and votes.

An address names a rater's code, the number of a pair in that rater's own order, and left or right: nothing in it, nor
in a header, depends on which method drew an image. No address holds the name of a file, and only the images that the
study lists are sent. Everything that the pages need comes from this server, which takes votes and nothing else.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Response, abort, redirect, render_template, request, url_for
from waitress.server import create_server
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.wrappers import Response as Answer

from moslora_core.errors import UserError

from . import store
from .study import IMAGES_FOLDER, Pair, Screen, Study, read_study

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
THREADS = 8
MAX_BODY = 1024  # bytes of a request; a vote has fewer than 100
SMALL = 256  # pixels of width below which images are enlarged without smoothing, to be seen as they are
QUESTIONS = {
    "subject_similarity": "Which image looks more like the reference subject?",
    "prompt_consistency": "Which image follows the description better?",
}
CHOICES = {"left": "Left", "tie": "No difference", "right": "Right"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(folder: Path, hosts: Sequence[str] | None = None) -> Flask:
    """The pages of the study in ``folder``.

    Args:
        hosts: names by which the server may be addressed; null for any.

    Raises:
        UserError: no study there, or its votes cannot be written or are of another.
    """
    study = read_study(folder)
    store.open_store(folder)
    store.check_study(folder, study)
    pairs = {pair.id: pair for pair in study.pairs}
    app = Flask(__name__)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, TRUSTED_HOSTS=None if hosts is None else list(hosts))

    def known(code: str) -> int:
        rater = store.find_rater(folder, code)
        return abort(404, "no rater has this code") if rater is None else rater

    def seen(code: str, number: int) -> tuple[int, list[Screen], Pair]:
        """The rater, what they see in order, and the pair that they see as that number."""
        rater = known(code)
        order = store.screens_of(folder, rater)
        if not 1 <= number <= len(order):
            abort(404, f"no pair {number}: expected 1 to {len(order)}")
        return rater, order, pairs[order[number - 1].pair]

    def image(name: str) -> Response:
        return Response((folder / IMAGES_FOLDER / name).read_bytes(), mimetype="image/png")

    @app.get("/")
    def start() -> str:
        return render_template("start.html", pairs=len(study.pairs), questions=QUESTIONS)

    @app.post("/raters")
    def begin() -> tuple[dict[str, str], int]:
        _own_json()
        try:
            code = store.add_rater(folder, study)
        except store.Full:
            abort(503, "this study takes no more raters")
        return {"page": url_for("go_on", code=code)}, 201

    @app.get("/rate")
    def come_back() -> Answer | tuple[str, int]:
        code = "".join(request.args.get("code", "").lower().split()).replace("-", "")
        if store.find_rater(folder, code) is None:
            page = render_template("start.html", pairs=len(study.pairs), questions=QUESTIONS, unknown=True)
            return page, 404
        return redirect(url_for("go_on", code=code))

    @app.get("/rate/<code>")
    def go_on(code: str) -> Answer:
        rater = known(code)
        number = _next(store.screens_of(folder, rater), store.votes_of(folder, rater), study)
        return redirect(url_for("done", code=code) if number is None else url_for("pair", code=code, number=number))

    @app.get("/rate/<code>/<int:number>")
    def pair(code: str, number: int) -> Answer | str:
        rater, order, shown = seen(code, number)
        votes = store.votes_of(folder, rater)
        # Nobody goes ahead of the first pair that is open.
        if number > (_next(order, votes, study) or len(order)):
            return redirect(url_for("go_on", code=code))
        return render_template(
            "pair.html",
            code=code,
            number=number,
            total=len(order),
            answered=sum(_answered(screen, votes, study) for screen in order),
            prompt=shown.prompt,
            class_name=study.subjects[shown.subject].class_name,
            references=len(study.subjects[shown.subject].references),
            questions=QUESTIONS,
            choices=CHOICES,
            votes={question: votes.get((shown.id, question)) for question in study.questions},
            size=study.size,
            small=study.size[0] < SMALL,
        )

    @app.get("/rate/<code>/<int:number>/<any(left, right):side>.png")
    def side(code: str, number: int, side: str) -> Response:
        _, order, shown = seen(code, number)
        return image(shown.images[(side == "right") != order[number - 1].swapped])

    @app.get("/rate/<code>/<int:number>/reference-<int:reference>.png")
    def reference(code: str, number: int, reference: int) -> Response:
        _, _, shown = seen(code, number)
        files = study.subjects[shown.subject].references
        if not 1 <= reference <= len(files):
            abort(404, f"no reference image {reference}: expected 1 to {len(files)}")
        return image(files[reference - 1])

    @app.post("/rate/<code>/<int:number>/votes")
    def vote(code: str, number: int) -> tuple[str, int]:
        _own_json()
        rater, _, shown = seen(code, number)
        given = request.get_json(silent=True)
        if not isinstance(given, dict) or set(given) != {"question", "choice"}:
            abort(400, "expected a JSON object with question and choice")
        for key, expected in (("question", study.questions), ("choice", store.CHOICES)):
            if given[key] not in tuple(expected):
                abort(400, f"{key}: expected one of {', '.join(expected)}")
        store.vote(folder, rater, shown.id, given["question"], given["choice"])
        return "", 204

    @app.get("/rate/<code>/done")
    def done(code: str) -> Answer | str:
        rater = known(code)
        order = store.screens_of(folder, rater)
        if _next(order, store.votes_of(folder, rater), study) is not None:
            return redirect(url_for("go_on", code=code))
        return render_template("done.html", code=code, total=len(order))

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Answer:
        """One line of plain text, with the headers that belong to the status."""
        answer = error.get_response()
        if error.code is not None and error.code >= 400:
            answer.set_data(f"{' '.join((error.description or error.name).split())}\n")
            answer.content_type = "text/plain; charset=utf-8"
        return answer

    @app.errorhandler(UserError)
    @app.errorhandler(OSError)
    def fail(error: UserError | OSError) -> Answer:
        """For the rater what to do, for the log what is wrong: a full disk, or a database or image that is damaged."""
        logger.error("not answered: %s", error)
        return refuse(ServiceUnavailable("the server cannot reach its files at the moment, please try again"))

    @app.after_request
    def same_headers(answer: Response) -> Response:
        answer.headers.update(_HEADERS)
        return answer

    return app


def _own_json() -> None:
    """Refuses what a page of another origin could send in a rater's name."""
    if request.mimetype != "application/json":
        abort(415, "expected application/json")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        abort(403, "expected a request of this site's own pages")
    if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        abort(403, "expected a request of this site's own pages")


def _answered(screen: Screen, votes: dict[tuple[str, str], str], study: Study) -> bool:
    return all((screen.pair, question) in votes for question in study.questions)


def _next(order: Sequence[Screen], votes: dict[tuple[str, str], str], study: Study) -> int | None:
    """Number of the first pair that is open; None when all are answered."""
    return next((n for n, screen in enumerate(order, start=1) if not _answered(screen, votes, study)), None)


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves a study until the process is stopped. Nothing is lost when it is: every vote is on the disk when taken.

    Args:
        host: address to listen at; any but this machine's own makes the study reachable for others.
        port: 0 for a free one.

    Raises:
        UserError: no study, or an address that cannot be listened at.
    """
    hosts = None if host not in LOOPBACK else [*LOOPBACK[:2], "[::1]"]
    app = create_app(folder, hosts)
    try:
        server = create_server(
            app, host=host, port=port, threads=THREADS, ident="", max_request_body_size=4 * MAX_BODY
        )
    except (OSError, socket.gaierror, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} port {port}: {reason}; choose another --port or --host") from None
    if hosts is None:
        logger.warning("everyone who reaches this machine at port %s can take part", server.effective_port)
    address = f"[{host}]" if ":" in host else host
    logger.info("serving %s at http://%s:%s/ (Ctrl-C stops it)", folder, address, server.effective_port)
    server.run()
