"""`loraserve adapters history`, `share`, `shadow`, `rollback`: generations of a running server's adapters."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from loraserve.cli.options import Subparsers, add_command
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.validation.printable import printable

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 60.0
MAX_ERROR_CHARS = 1000
DEFAULT_URL = "http://127.0.0.1:8000"
HASH_CHARS = 12
SHADOW_FRACTION = 0.1

HISTORY_EXAMPLES = """\
  loraserve adapters history sql --url http://127.0.0.1:8000

What was published under the name, oldest first. Requests may pin a generation that is kept as sql@2.
"""
SHARE_EXAMPLES = """\
  loraserve adapters share sql 2=0.95 3=0.05    a canary: every twentieth user gets generation 3
  loraserve adapters share sql 3=1              it has proved itself, all get it
  loraserve adapters rollback sql               it has not: shares end

Requests of the same user get the same generation, and who has a growing one keeps it. Shares sum to 1.
"""
SHADOW_EXAMPLES = """\
  loraserve adapters shadow sql 3 --fraction 0.1    every tenth request is copied to generation 3
  loraserve adapters history sql                    how many of its answers are the same
  loraserve adapters shadow sql --off               no request is copied any more

Copies run behind everything else, and what they answer is compared and returned to nobody.
"""
ROLLBACK_EXAMPLES = """\
  loraserve adapters rollback sql                 ends shares, or else goes back by one generation
  loraserve adapters rollback sql 2               to this one
  loraserve adapters rollback sql --expected 3    only if nobody else has changed it

It holds from the next request on; running ones finish as they began.
"""


class ServerAnswerError(LoraserveError):
    """The server can't be reached, or has refused what was asked."""


def add_parser(actions: Subparsers) -> None:
    """Add the commands to the actions of `adapters`."""
    history = add_command(actions, "history", "show an adapter's generations on a server", HISTORY_EXAMPLES)
    _add_server(history)
    history.set_defaults(run=run_history)
    share = add_command(actions, "share", "let generations share an adapter's requests", SHARE_EXAMPLES)
    _add_server(share)
    share.add_argument("shares", nargs="+", type=_share, metavar="GENERATION=SHARE", help="as 3=0.05")
    share.set_defaults(run=run_share)
    shadow = add_command(
        actions, "shadow", "copy requests of an adapter to a generation, to compare answers", SHADOW_EXAMPLES
    )
    _add_server(shadow)
    shadow.add_argument("generation", nargs="?", type=int, metavar="GENERATION", help="one that answers none")
    shadow.add_argument("--fraction", type=float, help=f"of the requests (default {SHADOW_FRACTION})")
    shadow.add_argument("--off", action="store_true", help="end the shadow")
    shadow.set_defaults(run=run_shadow)
    rollback = add_command(
        actions, "rollback", "go back to an earlier generation of an adapter", ROLLBACK_EXAMPLES
    )
    _add_server(rollback)
    rollback.add_argument("generation", nargs="?", type=int, metavar="GENERATION", help="left out: see below")
    rollback.add_argument(
        "--expected", type=int, metavar="GENERATION", help="what the adapter must be at, else nothing changes"
    )
    rollback.set_defaults(run=run_rollback)


def run_history(args: argparse.Namespace) -> int:
    """Print the generations. Raises ServerAnswerError."""
    return _print(_ask(args, "GET", "generations"))


def run_share(args: argparse.Namespace) -> int:
    """Give the shares, and print what holds then. Raises ServerAnswerError."""
    if len(dict(args.shares)) < len(args.shares):
        raise InvalidRequestError("a generation is given twice, give each one share")
    return _print(_ask(args, "PUT", "shares", {"shares": dict(args.shares)}))


def run_shadow(args: argparse.Namespace) -> int:
    """Begin or end a shadow, and print what holds then. Raises ServerAnswerError."""
    if args.off:
        if args.generation is not None or args.fraction is not None:
            raise InvalidRequestError("--off ends the shadow, leave GENERATION and --fraction out")
        return _print(_ask(args, "DELETE", "shadow"))
    if args.generation is None:
        raise InvalidRequestError("give the GENERATION that requests are to be copied to, or --off")
    fraction = SHADOW_FRACTION if args.fraction is None else args.fraction
    return _print(_ask(args, "PUT", "shadow", {"generation": args.generation, "fraction": fraction}))


def run_rollback(args: argparse.Namespace) -> int:
    """Go back, and print what holds then. Raises ServerAnswerError."""
    given = {"generation": args.generation, "expected_generation": args.expected}
    body = {name: value for name, value in given.items() if value is not None}
    return _print(_ask(args, "POST", "rollback", body))


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what requests call the adapter")
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server (default %(default)s)")
    parser.add_argument(
        "--api-key-env",
        metavar="VAR",
        help="the environment variable that holds an API key; changes need an administrator's",
    )


def _share(text: str) -> tuple[str, float]:
    number, _, share = text.partition("=")
    try:
        return str(int(number)), float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is no GENERATION=SHARE, such as 3=0.05") from None


def _ask(args: argparse.Namespace, method: str, what: str, body: Mapping[str, Any] | None = None) -> Any:
    import httpx  # noqa: PLC0415 (doctor runs without)

    if not args.url.startswith(("http://", "https://")):
        raise InvalidRequestError(f"--url is {args.url!r:.200}, give one such as {DEFAULT_URL}")
    url = f"{args.url.rstrip('/').removesuffix('/v1')}/adapters/{quote(args.name, safe='')}/{what}"
    try:
        answer = httpx.request(method, url, json=body, headers=_headers(args), timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ServerAnswerError(f"the server at {args.url:.200} can't be asked: {error}") from None
    if answer.status_code >= 400:
        raise ServerAnswerError(_refusal(answer))
    try:
        return answer.json()
    except ValueError:
        raise ServerAnswerError(f"what answers at {args.url:.200} is no loraserve server") from None


def _headers(args: argparse.Namespace) -> dict[str, str]:
    if args.api_key_env is None:
        return {}
    key = os.environ.get(args.api_key_env, "")
    if not key:
        raise InvalidRequestError(f"the environment variable {args.api_key_env} is not set, it holds the key")
    return {"authorization": f"Bearer {key}"}


def _refusal(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return f"{printable(str(text), MAX_ERROR_CHARS)} (status {answer.status_code})"


def _print(answer: Any) -> int:
    rows = [("generation", "share", "requests", "kept", "published", "hash", "source")]
    for one in answer["generations"]:
        since = datetime.fromtimestamp(one["since"], timezone.utc)
        rows.append(
            (
                f"{one['number']}{' *' if one['current'] else ''}",
                f"{one['share']:.2%}" if one["share"] else "-",
                "?" if one["requests"] is None else str(one["requests"]),
                "yes" if one["kept"] else "no",
                f"{since:%Y-%m-%d %H:%M:%S}Z",
                printable(str(one["hash"]), HASH_CHARS + 1)[:HASH_CHARS],
                printable(str(one["source"] or "?"), MAX_ERROR_CHARS),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for one in answer["generations"]:
        if one.get("shadow") is not None:
            print(_shadow_line(one["number"], one["shadow"]))
    return 0


def _shadow_line(number: int, shadow: Mapping[str, Any]) -> str:
    """What copies of requests on a generation came to."""
    what = f"is a shadow of {shadow['fraction']:.2%} of requests" if shadow["fraction"] else "was a shadow"
    compared = shadow["compared"]
    line = f"generation {number} {what}: {compared} compared"
    if compared:
        line += (
            f", {shadow['identical'] / compared:.2%} identical, {shadow['agreement']:.2%} of tokens up to "
            f"the first difference, {shadow['ending_alike'] / compared:.2%} ending alike, "
            f"{shadow['tokens'] / compared:.1f} tokens and {shadow['shadow_tokens'] / compared:.1f} of copies"
        )
    return f"{line}, {shadow['errors']} errors, {shadow['dropped']} dropped"
