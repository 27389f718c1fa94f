"""Requests as clients send them, OpenAI's fields and the engine's. Unknown fields are refused by name.

Fields of SamplingParams pass through as they are: that class alone says which there are and what they may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, model_validator

from minillm.errors import RequestError
from minillm.types import MAX_BIASED_TOKENS, SamplingParams, StructuredOutputsParams

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "FIELD_NAMES",
    "GenerationRequest",
    "Message",
    "ResponsesRequest",
    "TokenizeRequest",
]

OWN_FIELDS = frozenset(("n", "logprobs", "prompt_logprobs", "max_tokens"))
"""Fields that OpenAI's endpoints define otherwise than SamplingParams does."""
KNOWN = tuple(field.name for field in fields(SamplingParams))
SAMPLING = tuple(name for name in KNOWN if name not in OWN_FIELDS)
MAX_NAME = 256
MAX_PRIORITY = 1000
MAX_TOOLS = 128

Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Strict(BaseModel):
    """No conversions between types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def add_sampling_schema(schema: dict[str, Any]) -> None:
    """Describe the fields that pass through."""
    hints = get_type_hints(SamplingParams)
    for name in SAMPLING:
        schema["properties"].setdefault(name, TypeAdapter(hints[name] | None).json_schema())
    schema["additionalProperties"] = False


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    include_usage: bool | None = None
    """A last event with the tokens used."""


class GenerationRequest(BaseModel):
    """What all endpoints that generate have in common."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=add_sampling_schema, protected_namespaces=()
    )
    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    user: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    """Users get equal shares of the engine."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Lower is served first."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the request ends unfinished."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    """Cached prompts are shared only under an equal salt."""

    @model_validator(mode="after")
    def check_fields(self) -> GenerationRequest:
        """Refuse fields that nothing reads."""
        unknown = sorted(name for name in self.model_extra or {} if name not in SAMPLING)
        if unknown:
            raise ValueError(f"unknown or unsupported fields: {', '.join(name[:MAX_NAME] for name in unknown[:10])}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    def sampling(self, **own: Any) -> SamplingParams:
        """The engine's parameters: fields that were given, and `own`; None is as good as not given. RequestError."""
        given = {name: value for name, value in {**(self.model_extra or {}), **own}.items() if value is not None}
        for name in given:
            if name not in KNOWN:
                raise RequestError(f"{name} is not supported: leave it out")
        return SamplingParams(**{name: plain(name, value) for name, value in given.items()})

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def plain(name: str, value: Any) -> Any:
    """A value from JSON, whose objects have texts for keys, as SamplingParams takes it: token ids are numbers."""
    if name == "logit_bias" and isinstance(value, Mapping) and len(value) <= MAX_BIASED_TOKENS:
        # More are refused as they are: many numbers can be chosen such that a dict of them takes seconds.
        try:
            return {int(key): item for key, item in value.items()}
        except ValueError:
            raise RequestError("logit_bias takes token ids, as texts of digits, for keys") from None
    if name == "structured_outputs" and isinstance(value, Mapping):
        try:
            return StructuredOutputsParams(**value)
        except TypeError:
            raise RequestError("structured_outputs takes json, json_object, regex, choice or grammar") from None
    return value


def kind_of_prompt(value: Any) -> str:
    """Which form a prompt has, by its first part: trying a million tokens against all forms takes seconds."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    return "texts" if isinstance(first, str) else "prompts" if isinstance(first, list) else "tokens"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[Tokens], Field(fail_fast=True), Tag("prompts")],
        Discriminator(kind_of_prompt),
    ]
    max_tokens: int | None = None
    """Most tokens to generate; 16 if not given, as with OpenAI."""
    echo: bool | None = None
    """Begin the text with the prompt."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Count | None = None
    """Only as many as `n`: there is no ranking of completions."""
    suffix: str | None = None
    """Refused: no text can be put before a given end."""

    @model_validator(mode="after")
    def check_unsupported(self) -> CompletionRequest:
        """Refuse what cannot be had."""
        if self.suffix is not None:
            raise ValueError("suffix is not supported: leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported beyond n: leave it out")
        return self


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Nothing = None
    logprobs: Nothing = None
    """These are empty in answers, which clients send back as they were."""


class FunctionCall(Strict):
    """A function that the model wants called."""

    name: Annotated[str, Field(max_length=MAX_NAME)]
    arguments: str
    """JSON."""


class ToolCall(Strict):
    """A call that an earlier answer asked for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    """These are empty in answers, which clients send back as they were."""

    @property
    def text(self) -> str | None:
        """The content as one text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content


class Function(Strict):
    """A function that the model may ask for."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema."""
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may ask for."""

    type: Literal["function"]
    function: Function


class ToolName(Strict):
    """The name of a tool."""

    name: Annotated[str, Field(max_length=MAX_NAME)]


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: ToolName


class JsonSchema(Strict):
    """A schema as OpenAI's response_format holds it."""

    name: Annotated[str, Field(max_length=MAX_NAME)] = "answer"
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        """A schema, where one is asked for and nowhere else."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be there for type json_schema, and for no other")
        return self


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    """Most tokens to generate; what the context has left if not given."""
    max_completion_tokens: int | None = None
    """The same under its newer name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    """The model decides, unless it is made to call a tool, any or the named one."""
    parallel_tool_calls: bool | None = None
    """False reports one call at most."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def check_pairs(self) -> ChatRequest:
        """Refuse fields that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self


class InputMessage(Strict):
    """A message of /v1/responses."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class TextFormat(Strict):
    """What form the text has."""

    type: Literal["text"]


class TextOptions(Strict):
    """Options of the text."""

    format: TextFormat | None = None


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses: text alone, and nothing is stored."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: int | None = None
    """Most tokens to generate; what the context has left if not given."""
    text: TextOptions | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def check_one(self) -> ResponsesRequest:
        """There is one output."""
        if self.n not in (None, 1) or self.stream_options is not None:
            raise ValueError("n and stream_options are not fields of this endpoint: leave them out")
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation."""
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*system, Message(role="user", content=self.input)]
        return [*system, *(Message(role=each.role, content=each.content) for each in self.input)]


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages through the chat template."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    """Put the tokens around a text that the model expects; a chat template writes its own."""
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def check_one(self) -> TokenizeRequest:
        """Exactly one of the two forms."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    tokens: Tokens


REQUESTS = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
FIELD_NAMES = frozenset(KNOWN).union(*(request.model_fields for request in REQUESTS))
"""Of all requests."""
