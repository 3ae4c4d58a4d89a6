"""Keys of a reward by a judge: a language model behind an OpenAI-compatible server."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deepgrpo.config.base import NonNegative, PathText, Section
from deepgrpo.config.placeholders import placeholders


class JudgeKeys(Section):
    """A language model as the judge, asked over HTTP (chat completions of an OpenAI-compatible server)."""

    type: Literal["judge"] = "judge"
    base_url: str
    """The server's address up to /v1, e.g. "http://127.0.0.1:8000/v1"; requests go to base_url + "/chat/completions"."""
    model: str
    """Name of the model on that server."""
    prompt: str
    """User turn for the judge, with {response} in it, and {question}, {answer} or {column} for the row. {{name}} is the text
    {name}."""
    system: str | None = None
    """System turn for the judge; none: no such turn."""
    api_key_env: str | None = None
    """Environment variable with the key, sent as a bearer token; none: no key. The key itself is never written anywhere."""
    temperature: NonNegative | None = 0.0
    """Temperature of the judge's answers; none: the server's own."""
    max_tokens: PositiveInt | None = 512
    """Longest answer of the judge, in tokens; none: the server's own."""
    options: dict[str, str | int | float | bool] = {}
    """Further fields of the request, e.g. { top_p = 0.9, reasoning_effort = "low" }."""
    read: Literal["number", "regex", "json"] = "number"
    """Place of the score in the judge's answer. number: the last number. regex: the group of the last match of `pattern`.
    json: `key` of the last JSON object."""
    pattern: str | None = None
    """For read = "regex": a regular expression with one group, e.g. "Verdict: (yes|no)"."""
    key: str = "score"
    """For read = "json": key of the score, a nested one with dots."""
    words: dict[str, float] = {}
    """Numbers for words, ignoring case, e.g. { yes = 1, no = 0 }; for "regex" and "json"."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Worst and best score of the judge, mapped to 0 and 1, e.g. [1, 10], or [10, 1] where 1 is best. A score outside is
    unreadable."""
    failure_value: float = 0.0
    """Reward of a response without a score: no answer after all tries, or an unreadable one. Counted as a failed check."""
    timeout_s: PositiveFloat = 60.0
    """Seconds per try, from the request to the end of the answer."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Further tries after a timeout, a lost connection, or an answer 408, 409, 425, 429 or 5xx."""
    backoff_s: PositiveFloat = 1.0
    """Wait before the first retry; it doubles each time, up to `max_wait_s`, and a random half is taken off. A Retry-After of
    the server comes first."""
    max_wait_s: PositiveFloat = 60.0
    """Longest wait before a retry. A server that asks for more costs the response its score."""
    concurrency: PositiveInt = 8
    """Most requests in flight."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests per minute, evenly spaced; none: no limit."""
    cache: PathText | None = "~/.cache/deepgrpo/judge"
    """Directory of the judge's answers, found again by model and prompt, in this run or another; none: ask every time."""

    @field_validator("base_url")
    @classmethod
    def _is_plain_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  raises if it is no number
        except ValueError as error:
            raise ValueError(f"reward.base_url is no address ({error}); write e.g. http://127.0.0.1:8000/v1") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("reward.base_url holds a name or a password; put a key into an environment variable, and its name "
                             "into reward.api_key_env")  # fmt: skip
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"reward.base_url is {url!r}; it should begin with http:// or https:// and a host")
        if parts.query or parts.fragment:
            raise ValueError(
                f"reward.base_url is {url!r}; leave out what follows ? and #, and write further fields into options"
            )
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "reward.api_key_env is no name of an environment variable; write the name, e.g. OPENAI_API_KEY, not the key"
            )
        return name

    @field_validator("prompt")
    @classmethod
    def _shows_the_response(cls, prompt: str) -> str:
        if "response" not in {each.name for each in placeholders(prompt)}:
            raise ValueError(
                "reward.prompt has no {response}: the judge would not see what it judges; write {response} into it"
            )
        return prompt

    @field_validator("options")
    @classmethod
    def _leaves_the_rest_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in ("model", "messages", "stream", "n"):
            if name in options:
                raise ValueError(
                    f"reward.options.{name} is set, but a request has one model, one answer, and the turns of reward.prompt; "
                    f"remove reward.options.{name}"
                )
        return options

    @model_validator(mode="after")
    def _can_be_read(self) -> JudgeKeys:
        if (self.read == "regex") != (self.pattern is not None):
            raise ValueError(
                'reward.read is "regex", but reward.pattern is missing; add a regular expression with one group'
                if self.read == "regex"
                else f'reward.pattern is {self.pattern!r}, but reward.read is "{self.read}"; set reward.read = "regex"'
            )
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(
                    f"reward.pattern is {self.pattern!r}, which is no regular expression: {error}"
                ) from None
            if groups != 1:
                raise ValueError(
                    f"reward.pattern is {self.pattern!r} with {groups} groups; put one around the score: (…)"
                )
        if self.words and self.read == "number":
            raise ValueError('reward.words is set, but reward.read is "number"; set reward.read = "regex" or "json"')
        if self.scale[0] == self.scale[1]:
            raise ValueError(f"reward.scale is {list(self.scale)}; its ends, worst and best, should differ")
        return self

    def share(self, workers: int, at: str = "reward") -> Any:
        """This section for one of several reward workers: its part of the limits. Raises ValueError if there is too little.

        Args:
            at: the section's name.
        """
        if self.concurrency < workers:
            raise ValueError(
                f"{at}.concurrency is {self.concurrency}, but cluster.reward_workers = {workers} share it; raise it, or take "
                "fewer workers: a judge needs none"
            )
        changes: dict[str, Any] = {"concurrency": self.concurrency // workers}
        if self.requests_per_minute is not None:
            changes["requests_per_minute"] = self.requests_per_minute / workers
        return self.model_copy(update=changes)
