"""Call huggingface_hub quietly, and turn its errors into ours."""

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lpsparse.checkpoint.hub import http_error, setting
from lpsparse.errors import (
    InputError,
    InterruptError,
    LpsparseError,
    RemoteError,
    ResumableError,
    TerminatedError,
)

_SILENCE = 300  # seconds without a byte after which the hub is given up: huggingface_hub would wait for ever
UNSEEN = "no commit was made, so the repository is unchanged"
UNSURE = "it is not known whether the commit was made"
_AGAIN = "push again: files that have arrived are not sent twice"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
_MENDS = {
    400: "fix what it names, and push again",
    401: LOG_IN,
    402: "see the billing of that account, or push to another name",
    403: "use a token that may write there (`hf auth login`), or push to a name of your own, or --create-pr",
    404: "check the name, and that the token may see it",
    409: "the repository has changed meanwhile: look at it, and push again",
    412: "the repository has changed meanwhile: look at it, and push again",
    413: "a file or the account is over the hub's limits: see huggingface.co/docs/hub/storage-limits",
}


@contextmanager
def calm(bars: bool, say: Callable[[str], None]) -> Generator[None]:
    """Use huggingface_hub without its log (which names signed addresses), with or without bars, with its
    warnings passed to `say` and with a timeout."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
        logging,
    )

    verbosity, session = logging.get_verbosity(), get_session()
    hide = not bars and setting("HF_HUB_DISABLE_PROGRESS_BARS") is None and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    session.timeout = _SILENCE
    if hide:
        disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            yield
        for each in noted:
            if issubclass(each.category, UserWarning):  # others are for those who write huggingface_hub
                say(" ".join(str(each.message).split()))
    finally:
        logging.set_verbosity(verbosity)
        session.timeout = None
        if hide:
            enable_progress_bars()


@contextmanager
def asking(repo: str, so_far: str) -> Generator[None]:
    """Turn an exception inside into an error that says how far the push came."""
    try:
        yield
    except LpsparseError:
        raise
    except TerminatedError as error:
        raise ResumableError(754, f"{repo}: stopped by SIGTERM: {so_far}", hint=_AGAIN) from error
    except KeyboardInterrupt as error:
        raise InterruptError(755, f"{repo}: interrupted: {so_far}", hint=_AGAIN) from error
    except (http_error(), OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise _explain(repo, so_far, error) from error


def _explain(repo: str, so_far: str, error: BaseException) -> LpsparseError:
    """By status where the hub answered, without its address, which may be a signed one."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    chain = [error]
    while chain[-1].__cause__ is not None:  # an upload's own errors are wrapped
        chain.append(chain[-1].__cause__)
    answered = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if answered is not None:
        status = answered.response.status_code
        said = answered.server_message or answered.response.reason_phrase
        so_far = UNSEEN if so_far == UNSURE and status < 500 else so_far
        what = f"{repo}: the hub answered {status} {_first(said)}; {so_far}"
        return RemoteError(807, what, hint=_MENDS.get(status, f"later {_AGAIN}"))
    local = next((each.filename for each in chain if isinstance(each, OSError) and each.filename), None)
    if local is not None:
        return InputError(338, f"{local}: cannot be read: {so_far}", hint=f"fix the disk, and {_AGAIN}")
    if isinstance(error, HFValidationError):
        return RemoteError(806, f"{repo}: {_first(str(error))}", hint="give another name")
    why = _first(str(chain[-1])) or type(chain[-1]).__name__
    if isinstance(chain[-1], (ValueError, LookupError, TypeError)):
        why = f"cannot parse the hub's answer ({why})"
    denied = isinstance(chain[-1], PermissionError)  # by Xet's client
    hint = LOG_IN if denied else f"check the network, and {_AGAIN}"
    return RemoteError(808, f"{repo}: {why}; {so_far}", hint=hint)


def _first(text: str) -> str:
    """Its first line, not too much of it."""
    return (text.strip().splitlines() or [""])[0][:160]
