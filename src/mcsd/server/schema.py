"""The bodies of requests, in OpenAI's names and ranges. What is not named here is refused.

Fields that have no effect on the text are taken and not used. A null counts as a field that is left out.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST_STOPS = 4
_MOST_BIASES = 1024
_MOST_TOKENS = 1 << 20
_MOST_WORDS = 256
_MOST_MESSAGES = 4096
_MOST_TOOLS = 128

Text = Annotated[str, Field(max_length=1 << 28)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Object = dict[str, Any]


class Body(BaseModel):
    """What every body keeps to: no unknown field, no conversion of types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextPart(Body):
    """A part of a message; other kinds than text are refused."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


Content = Text | Annotated[list[TextPart], Field(max_length=_MOST_MESSAGES)]


class FunctionCall(Body):
    """The function that an answer has called."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Text


class ToolCall(Body):
    """A call in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class Function(Body):
    """A function that the model may call; ``strict``: every call of it fits its schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: Annotated[str, Field(max_length=256)]


class NamedTool(Body):
    """The tool that an answer must call."""

    type: Literal["function"]
    function: FunctionName


class Prediction(Body):
    """A text that the answer is expected to resemble: a source of candidates, without effect on the text."""

    type: Literal["content"]
    content: Content


class PlainText(Body):
    """Any text: the default."""

    type: Literal["text"]


class JsonObject(Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema. Every answer follows it, whatever ``strict`` says."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[Object, Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class JsonSchema(Body):
    """JSON that a schema allows, in chat and text completions."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatJsonSchema(NamedSchema):
    """JSON that a schema allows, in ``/v1/responses``."""

    type: Literal["json_schema"]


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Speculative(Body):
    """Whether candidates are proposed. A batch has one tree and one scheme: a request can name those of the engine."""

    enabled: bool | None = None
    tree: Annotated[str, Field(max_length=256)] | None = None
    scheme: Annotated[str, Field(max_length=64)] | None = None


class SpeculativeOfChunks(Speculative):
    """The same, for answers whose chunks can carry traces."""

    trace: bool = False


class WithoutEffect(Body):
    """Fields of OpenAI's API that have no effect on the text."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    parallel_tool_calls: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class Generation(WithoutEffect):
    """What requests for text have in common. The second part is mcsd's own, with the names of `SamplingParams`."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool = False

    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MOST_WORDS)] | None = None
    include_stop: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=_MOST_WORDS)] | (
        None
    ) = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    speculative: Speculative | None = None
    return_token_ids: bool = False
    regex: Text | None = None
    grammar: Text | None = None


class _Sampling(Generation):
    """What chat and text completions have in common."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=_MOST_STOPS)]
        | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=_MOST_BIASES),
        ]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    speculative: SpeculativeOfChunks | None = None
    prediction: Prediction | None = None
    response_format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None


class ChatRequest(_Sampling):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(_Sampling):
    """The body of ``/v1/completions``."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=_MOST_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST_WORDS)]
        | Annotated[
            list[Annotated[list[TokenId], Field(max_length=_MOST_TOKENS)]], Field(min_length=1, max_length=_MOST_WORDS)
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None


class ResponseItem(Body):
    """A message of the input of ``/v1/responses``."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Annotated[str, Field(max_length=256)] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class TextFormat(Body):
    """The format of the answer's text."""

    format: Annotated[PlainText | JsonObject | FlatJsonSchema, Field(discriminator="type")] | None = None


class ResponsesRequest(Generation):
    """The body of ``/v1/responses``. Nothing is stored, so no earlier response can be named."""

    input: Text | Annotated[list[ResponseItem], Field(min_length=1, max_length=_MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    text: TextFormat | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    background: Literal[False] = False
    truncation: Literal["disabled"] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=_MOST_STOPS)] | (
        None
    ) = None


class TokenizeRequest(Body):
    """The body of ``/tokenize``: a text, or a conversation for the chat template."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """The body of ``/detokenize``."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=_MOST_TOKENS)]
