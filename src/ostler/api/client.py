"""A client of the REST API: `unix:PATH`, `http://HOST:PORT`, `https://HOST:PORT`. Blocking; one thread at a time."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from ostler import errors
from ostler.api.places import default_socket
from ostler.errors import BadRequest, HostError, OstlerError
from ostler.hostd.models import JobState, JobView, Problem

TIMEOUT_S = 40.0
WAIT_S = 30.0
_ENDED = {JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.INTERRUPTED}


class Client:
    """Speaks to one host service; a context manager."""

    def __init__(
        self, url: str | None = None, *, token: str | None = None, ca: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:  # fmt: skip
        """Without a URL, this user's own service. Raises BadRequest for what is no URL of one."""
        self.url = url or f"unix:{default_socket()}"
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._socket: Path | None = None
        if self.url.startswith("unix:"):
            self._socket = Path(self.url.removeprefix("unix:").removeprefix("//"))
            transport = httpx.HTTPTransport(uds=str(self._socket))
            self._http = httpx.Client(transport=transport, base_url="http://host", headers=headers, timeout=TIMEOUT_S)
        elif self.url.startswith(("http://", "https://")):
            self._http = httpx.Client(
                base_url=self.url.rstrip("/"), headers=headers, timeout=TIMEOUT_S, verify=_trust(ca, certificate)
            )
        else:
            raise BadRequest(f"host {self.url!r}: expected unix:PATH, http://HOST:PORT or https://HOST:PORT")

    def get(self, path: str, **query: Any) -> Any:
        """What is there. Raises what the service answered with."""
        return self.call("GET", path, query={key: value for key, value in query.items() if value is not None})

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Have it done."""
        return self.call("POST", path, body=body)

    def delete(self, path: str, **query: Any) -> None:
        """Have it gone."""
        self.call("DELETE", path, query=query)

    def call(
        self, method: str, path: str, *, body: dict[str, Any] | None = None, query: dict[str, Any] | None = None
    ) -> Any:
        """One request. Raises the OstlerError that the answer tells, HostError where there is none."""
        if self._socket is not None and not self._socket.exists():
            # httpcore would forget to close what it could not connect.
            raise HostError(f"host {self.url}: nobody listens there; does `ostler host serve` run?")
        try:
            answer = self._http.request(method, path, json=body, params=query)
        except httpx.HTTPError as error:
            raise HostError(
                f"host {self.url}: {str(error) or type(error).__name__}; does `ostler host serve` run?"
            ) from (error)
        if answer.status_code >= 400:
            raise error_of(answer)
        if "json" not in answer.headers.get("content-type", ""):
            return answer.text
        return answer.json()

    def wait(self, job: dict[str, Any]) -> JobView:
        """The job once it has ended. Raises what it failed with."""
        view = JobView.model_validate(job)
        while view.state not in _ENDED:
            view = JobView.model_validate(self.get(f"/v1/jobs/{view.id}", wait_s=WAIT_S))
        if view.state is not JobState.DONE:
            if view.problem is not None:
                raise as_error(view.problem)
            raise OstlerError(f"job {view.id}: {view.state.value}: {view.message}")
        return view

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def error_of(answer: httpx.Response) -> OstlerError:
    """What an answer of 400 and above says."""
    try:
        return as_error(Problem.model_validate_json(answer.content))
    except ValueError:
        return HostError(f"{answer.url}: answered {answer.status_code}, and not as a host service does")


def as_error(problem: Problem) -> OstlerError:
    """The exception of the same class, or the nearest there is here."""
    kind = getattr(errors, problem.kind, None)
    if isinstance(kind, type) and issubclass(kind, OstlerError) and not issubclass(kind, errors.GuestCrash):
        return kind(problem.message)
    return (BadRequest if 400 <= problem.status < 500 else HostError)(problem.message)


def _trust(ca: Path | None, certificate: tuple[Path, Path] | None) -> ssl.SSLContext | bool:
    if ca is None and certificate is None:
        return True
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
        if certificate is not None:
            context.load_cert_chain(*map(str, certificate))
    except (OSError, ssl.SSLError) as error:
        raise BadRequest(f"TLS: {error}; expected certificates and a key, PEM") from error
    return context
