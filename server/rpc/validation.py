"""Turns a request message into a GenerationJob, or into all of its field violations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.parameters import AGAINST_TYPES, MAX_LOGPROBS, MAX_SAMPLES, MAX_TEMPERATURE, samples
from mtlora.prompt import PromptEncoder
from mtlora.task import TaskSpec, template_fields
from server.errors import Violation
from server.job import GenerationJob, Sampling, ServedTask
from server.rpc import parameters as more
from server.rpc.documents import Document
from server.rpc.own_types import AnswerConstraint
from server.tenants import OPEN_TENANT, Tenant

if TYPE_CHECKING:
    from server.rpc.seeing import Sight

MAX_STOP_STRINGS = 8
_ROLES = ("system", "user", "assistant")
# Fields of GenerationParameters up to this number are checked here, others in parameters.py.
_LAST_PLAIN = pb.GenerationParameters.LOGPROBS_FIELD_NUMBER
_PLAIN = ("temperature", "top_p", "top_k", "seed", "logprobs")


@dataclass(frozen=True)
class PromptLimits:
    """Limits of the backbone and the engine."""

    max_model_len: int
    vocab_size: int
    # Tokens that end an answer: the tokenizer's, and those of the backbone's generation config.
    end_tokens: frozenset[int] = frozenset()


@dataclass(slots=True)
class Received:
    """A request, and what its job depends on besides.

    task: None if the request names none. own: what holds the answer to the request's own type, if it brings one.
    document: the document part of its prompt; its fields are then the task part's alone. sight: the image that the task
    takes.
    """

    request: pb.GenerateRequest
    task: ServedTask | None
    tenant: Tenant = OPEN_TENANT
    cache_salt: str | None = None
    delta_tokens: int = 1
    stream: bool = False
    own: AnswerConstraint | None = None
    document: Document | None = None
    sight: "Sight | None" = None


def validate(received: Received, prompts: PromptEncoder, limits: PromptLimits) -> GenerationJob | list[Violation]:
    """The job that a request asks for, or every violation in it. Sets the place of its image."""
    task, values = received.task, _rare_values(received)
    violations = list(_violations(received, values, prompts, limits))
    if task is None or violations:
        return violations
    prompt = _prompt(received, task.spec, prompts, limits.max_model_len - 1)
    if isinstance(prompt, Violation):
        return [prompt]
    if violation := _violation_beside(received, values, len(prompt.ids), limits):
        return [violation]
    constraint = received.own or _constraint(received.request, task)
    plain = _job(received, task, prompt, constraint, limits)
    job = plain if values is None else _with_more(plain, values, limits.vocab_size)
    if constraint and not isinstance(job, list):
        return list(_type_violations(job.sampling, task.spec, constraint)) or job
    return job


def _rare_values(received: Received) -> Mapping[str, Any] | None:
    """The request's and the task's values of rare parameters; None if neither has any."""
    parameters, task = received.request.parameters, received.task
    if task and (task.spec.defaults or any(f.number > _LAST_PLAIN for f, _ in parameters.ListFields())):
        return more.values_of(parameters, task.spec.defaults, stream=received.stream)
    return None


def _violations(
    received: Received, values: Mapping[str, Any] | None, prompts: PromptEncoder, limits: PromptLimits
) -> Iterator[Violation]:
    """What can be said before the prompt is encoded."""
    request, task = received.request, received.task
    if task is None:
        yield Violation("task_id", "found none; allowed: a task that ListTasks shows")
    if received.document is not None and task is not None:
        yield from _task_violations(request.fields, task, received.document)
    else:
        yield from _input_violations(request, task.spec if task else None, prompts, limits, received.tenant)
    if task and (task.spec.picture is not None or request.HasField("image")):
        yield from _image_violations(request, task.spec)
    yield from _parameter_violations(request.parameters, received.tenant)
    if values is not None:
        yield from more.violations(values, limits.vocab_size, limits.end_tokens, stream=received.stream)


def _violation_beside(
    received: Received, values: Mapping[str, Any] | None, prompt_tokens: int, limits: PromptLimits
) -> Violation | None:
    """A parameter that does not go with the prompt."""
    if values and (violation := more.prompt_violation(values, prompt_tokens, limits.vocab_size)):
        return violation
    if values and received.sight and values.get("prompt_logprobs"):
        found = f"found {values['prompt_logprobs']}; allowed: 0, as the prompt has an image"
        return Violation("parameters.prompt_logprobs", found)
    asked, room = received.request.parameters.max_new_tokens, limits.max_model_len - prompt_tokens
    if asked > room:
        return Violation(
            "parameters.max_new_tokens",
            f"found {asked}; allowed: 1 to {room}, as the prompt takes {prompt_tokens} of the context's "
            f"{limits.max_model_len} tokens",
        )
    return None


class _Prompt(NamedTuple):
    """Token ids; the first `point` of them are the document's part."""

    ids: Sequence[int]
    point: int = 0


def _prompt(received: Received, task: TaskSpec, prompts: PromptEncoder, longest: int) -> _Prompt | Violation:
    """The prompt of a request without violations, or its violation; sets the position of its image."""
    request, document, sight = received.request, received.document, received.sight
    given, fields = request.WhichOneof("input") or "image", dict(request.fields.values)
    if given == "token_ids":
        found = _Prompt(request.token_ids.values)
    elif given == "chat":
        try:
            text = _render_chat(request, prompts)
        except TemplateError as error:
            return Violation("chat.messages", f"the backbone's chat template refuses them: {error}")
        # Refuse a text that cannot fit before encoding it, which would take long.
        if (fewest := prompts.fewest_tokens(text)) > longest:
            return _too_long(given, f"at least {fewest}", longest)
        found = _Prompt(prompts.chat(text))
    elif document is not None:
        text = task.template.format_map(fields)
        if (fewest := len(document.ids) + prompts.fewest_tokens(text)) > longest:
            return _too_long(given, f"at least {fewest}", longest)
        found = _Prompt((*document.ids, *prompts.text(text)), len(document.ids))
    elif sight is not None:
        texts = task.around_image(fields if given == "fields" else request.text)
        if (fewest := sight.soft_tokens + sum(map(prompts.fewest_tokens, texts))) > longest:
            return _too_long(given, f"at least {fewest}", longest)
        ids, sight.at = prompts.around_image(texts, sight.soft_tokens)
        found = _Prompt(ids)
    else:
        parts = task.parts(fields if given == "fields" else request.text)
        if (fewest := prompts.fewest_tokens(parts.document) + prompts.fewest_tokens(parts.task)) > longest:
            return _too_long(given, f"at least {fewest}", longest)
        found = _Prompt(*prompts.parts(parts))
    if not found.ids:
        return Violation(given, "found 0 tokens; allowed: at least 1")
    return _too_long(given, str(len(found.ids)), longest) if len(found.ids) > longest else found


def samples_of(request: pb.GenerateRequest, task: ServedTask | None) -> int:
    """Number of requested sequences; 1 for a number that `validate` will refuse."""
    parameters = request.parameters
    if task is not None and task.spec.defaults:
        best_of = samples(more.values_of(parameters, task.spec.defaults, stream=False))[1]
    else:
        best_of = parameters.best_of or parameters.n
    return best_of if 1 < best_of <= MAX_SAMPLES else 1


def _input_violations(
    request: pb.GenerateRequest, task: TaskSpec | None, prompts: PromptEncoder, limits: PromptLimits, tenant: Tenant
) -> Iterator[Violation]:
    match request.WhichOneof("input"):
        case "text":
            yield from _text_violations(request.text, task)
        case "fields":
            yield from _fields_violations(request.fields, task)
        case "chat":
            yield from _chat_violations(request.chat, prompts)
        case "token_ids":
            yield from _token_violations(request.token_ids.values, prompts, limits, tenant)
        case _:
            if not (task and task.picture and not task.fields):
                yield Violation("input", "found none; allowed: one of text, chat, fields, token_ids")


def _image_violations(request: pb.GenerateRequest, task: TaskSpec) -> Iterator[Violation]:
    if task.picture is None:
        yield Violation("image", f"found one; allowed: none, as task {task.id} takes no image")
        return
    if not request.HasField("image") and not request.without_adapter:
        yield Violation("image", f"found none; allowed: an image, which task {task.id} takes")
    if (given := request.WhichOneof("input")) in ("chat", "token_ids"):
        yield Violation(given, f"found in a request of task {task.id}, which takes an image; allowed: text or fields")


def _text_violations(text: str, task: TaskSpec | None) -> Iterator[Violation]:
    if task and task.picture and not task.fields:
        if text:
            yield Violation("text", f"found a text; allowed: none, as task {task.id} takes only an image")
        return
    if not text.strip():
        yield Violation("text", "found only blanks; allowed: a text")
    if task and len(task.fields) != 1:
        yield Violation("text", f"task {task.id} takes the fields {', '.join(task.fields)}; allowed: fields with these")


def _fields_violations(fields: pb.TemplateFields, task: TaskSpec | None) -> Iterator[Violation]:
    if not any(value.strip() for value in fields.values.values()) and not (task and task.picture and not task.fields):
        yield Violation("fields", "found only blanks; allowed: a text in at least one field")
    if task:
        yield from _named_violations(fields, task, task.fields)


def _named_violations(fields: pb.TemplateFields, task: TaskSpec, names: Sequence[str]) -> Iterator[Violation]:
    takes = f"task {task.id} takes {', '.join(names) or 'none'}"
    for name in names:
        if name not in fields.values:
            yield Violation(f"fields.values[{name}]", f"missing; {takes}")
    for name in sorted(fields.values):
        if name not in names:
            yield Violation(f"fields.values[{name}]", f"unknown; {takes}")


def sharing_violation(task: ServedTask, template: str) -> str | None:
    """The violation if a task does not share this document template, else None."""
    spec = task.spec
    if spec.image is not None:
        return f"task {spec.id} takes images; allowed: tasks of texts (Classify and Score take images)"
    if task.activation != "task":
        return (
            f"task {spec.id} is of adapter {task.adapter_name}, which acts on every token and so shares no document; "
            "allowed: tasks whose adapter has the activation task, or Generate"
        )
    if spec.document_template != template:
        return f"the document template of task {spec.id} is another than the document's; allowed: tasks with the same"
    return None


def _task_violations(fields: pb.TemplateFields, task: ServedTask, document: Document) -> Iterator[Violation]:
    if reason := sharing_violation(task, document.template):
        yield Violation("task_id", reason)
    else:
        yield from _named_violations(fields, task.spec, template_fields(task.spec.template))


def _too_long(given: str, found: str, longest: int) -> Violation:
    return Violation(given, f"prompt is too long: found {found} tokens with the template; allowed: {longest}")


def _chat_violations(chat: pb.Chat, prompts: PromptEncoder) -> Iterator[Violation]:
    if not prompts.has_chat_template:
        yield Violation("chat", "the backbone has no chat template; allowed: text or fields")
    if not chat.messages:
        yield Violation("chat.messages", "found none; allowed: at least one")
    for index, message in enumerate(chat.messages):
        where = f"chat.messages[{index}]"
        if message.role not in _ROLES:
            yield Violation(f"{where}.role", f"found {message.role[:32]!r}; allowed: {', '.join(_ROLES)}")
        elif message.role == "system" and index > 0:
            yield Violation(f"{where}.role", "found 'system' after the first message; allowed: user, assistant")
        if not message.content.strip():
            yield Violation(f"{where}.content", "found only blanks; allowed: a text")
        if found := prompts.reserved_in(message.content):
            what = f"found {found[0]}, a special token or a mark of the chat template"
            yield Violation(f"{where}.content", f"{what}; allowed: a text without special tokens and marks")
    if chat.messages and chat.messages[-1].role in ("system", "assistant"):
        where = f"chat.messages[{len(chat.messages) - 1}]"
        yield Violation(f"{where}.role", f"found {chat.messages[-1].role!r} in the last message; allowed: user")


def _token_violations(
    ids: Sequence[int], prompts: PromptEncoder, limits: PromptLimits, tenant: Tenant
) -> Iterator[Violation]:
    """Special tokens are refused: no other input can say a chat's turn or a text's end either."""
    if not tenant.token_ids:
        yield Violation("token_ids", "found in a request of a tenant without `token_ids`; allowed: text, chat, fields")
    elif len(ids) >= limits.max_model_len:
        yield _too_long("token_ids", str(len(ids)), limits.max_model_len - 1)
    else:
        own = prompts.prefix_ids
        begin = len(own) if tuple(ids[: len(own)]) == own else 0
        for index, token in enumerate(ids[begin:], begin):
            where = f"token_ids.values[{index}]"
            if token >= limits.vocab_size:
                yield more.no_token(where, token, limits.vocab_size)
            elif token in prompts.special_ids:
                yield Violation(where, f"found {token}, a special token; allowed: ordinary tokens")


def _parameter_violations(parameters: pb.GenerationParameters, tenant: Tenant) -> Iterator[Violation]:
    def out_of(name: str, allowed: str) -> Violation:
        return Violation(f"parameters.{name}", f"found {getattr(parameters, name):g}; allowed: {allowed}")

    if parameters.HasField("max_new_tokens") and parameters.max_new_tokens < 1:
        yield out_of("max_new_tokens", "1 or more")
    if tenant.max_new_tokens is not None and parameters.max_new_tokens > tenant.max_new_tokens:
        yield out_of("max_new_tokens", f"1 to {tenant.max_new_tokens}, the tenant's max_new_tokens")
    # This form of the comparison refuses NaN.
    if not 0 <= parameters.temperature <= MAX_TEMPERATURE:
        yield out_of("temperature", f"0 to {MAX_TEMPERATURE:g}")
    if parameters.HasField("top_p") and not 0 < parameters.top_p <= 1:
        yield out_of("top_p", "above 0, up to 1")
    if parameters.seed >= 2**63:
        yield Violation("parameters.seed", f"found {parameters.seed}; allowed: 0 to {2**63 - 1}")
    if parameters.logprobs > MAX_LOGPROBS:
        yield out_of("logprobs", f"0 to {MAX_LOGPROBS}")
    stop = parameters.stop.values
    if len(stop) > MAX_STOP_STRINGS:
        yield Violation("parameters.stop.values", f"found {len(stop)}; allowed: up to {MAX_STOP_STRINGS}")
    for index, value in enumerate(stop[: MAX_STOP_STRINGS + 1]):
        if not value:
            yield Violation(f"parameters.stop.values[{index}]", "found an empty string; allowed: 1 character or more")
    if tenant.max_stop_characters is not None and (found := sum(map(len, stop))) > tenant.max_stop_characters:
        allowed = f"up to {tenant.max_stop_characters}, the tenant's max_stop_characters"
        yield Violation("parameters.stop.values", f"found {found} characters in all; allowed: {allowed}")


def _render_chat(request: pb.GenerateRequest, prompts: PromptEncoder) -> str:
    return prompts.render_chat([{"role": each.role, "content": each.content} for each in request.chat.messages])


def _constraint(request: pb.GenerateRequest, task: ServedTask) -> AnswerConstraint | None:
    """The constraint of the task's type."""
    found = task.spec.constraint(without_adapter=request.without_adapter)
    if found is None or request.free:
        return None
    fewest = task.version.fewest if task.version is not None else None
    return AnswerConstraint(found.text, found.type.name, fewest[task.spec.id] if fewest else 1)


def _type_violations(sampling: Sampling, task: TaskSpec, constraint: AnswerConstraint) -> Iterator[Violation]:
    """Violations that would cut an answer before its type allows an end."""
    if sampling.max_new_tokens < constraint.fewest_tokens:
        yield Violation(
            "parameters.max_new_tokens",
            f"found {sampling.max_new_tokens}, after the limits of tenant and context; allowed: "
            f"{constraint.fewest_tokens} or more, as the shortest answer of this type takes so many tokens",
        )
    if other := [stop for stop in sampling.stop if stop not in task.stop]:
        allowed = (
            f"the task's own, {', '.join(map(repr, task.stop))}; others only with `free`, because the answer has a type"
        )
        yield Violation("parameters.stop.values", f"found {other[0][:64]!r}; allowed: {allowed}")
    for name in AGAINST_TYPES if sampling.more else ():
        if getattr(sampling.more, name):
            yield Violation(
                f"parameters.{name}",
                "found together with a type of answer; allowed: only with `free`",
            )


def _job(
    received: Received, task: ServedTask, prompt: _Prompt, constraint: AnswerConstraint | None, limits: PromptLimits
) -> GenerationJob:
    """The job of a request without violations, but for its rare parameters."""
    request, document = received.request, received.document
    room = limits.max_model_len - len(prompt.ids)
    most = min(room, received.tenant.max_new_tokens or room)
    return GenerationJob(
        task=task,
        prompt_ids=tuple(prompt.ids),
        sampling=_sampling(request.parameters, task.spec, most, limits.vocab_size, constraint),
        without_adapter=request.without_adapter,
        cache_salt=received.cache_salt,
        delta_tokens=received.delta_tokens,
        strip=request.WhichOneof("input") != "chat" or constraint is not None,
        include_reasoning=request.include_reasoning,
        answer_type=constraint.type_name if constraint else "",
        activation=prompt.point if task.activation == "task" else None,
        lease=document.lease if document is not None else None,
    )


def _sampling(
    parameters: pb.GenerationParameters, task: TaskSpec, most: int, vocab_size: int, constraint: AnswerConstraint | None
) -> Sampling:
    return Sampling(
        max_new_tokens=parameters.max_new_tokens or min(task.max_new_tokens, most),
        temperature=parameters.temperature,
        top_p=parameters.top_p if parameters.HasField("top_p") else 1.0,
        top_k=min(parameters.top_k, vocab_size),
        seed=parameters.seed if parameters.HasField("seed") else None,
        stop=tuple(parameters.stop.values) if parameters.HasField("stop") else task.stop,
        logprobs=parameters.logprobs,
        constraint=constraint.text if constraint else None,
    )


def _with_more(job: GenerationJob, values: Mapping[str, Any], vocab_size: int) -> GenerationJob | list[Violation]:
    """Add rare sampling values to a job. They are already valid, except for their relation to `max_new_tokens`."""
    most, least = job.sampling.max_new_tokens, values.get("min_new_tokens", 0)
    if least > most:
        return [Violation("parameters.min_new_tokens", f"found {least}; allowed: 0 to {most}, max_new_tokens")]
    plain = {name: values[name] for name in _PLAIN if name in values}
    if "top_k" in plain:
        plain["top_k"] = min(plain["top_k"], vocab_size)
    n, best_of = samples(values)
    return replace(
        job,
        sampling=replace(job.sampling, more=more.more_sampling(values), **plain),
        n=n,
        best_of=best_of,
        return_token_ids=values.get("return_token_ids", False),
        priority=values.get("priority", 0),
    )
