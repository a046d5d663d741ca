"""Chat messages to prompt text, by the Jinja templates that models bring along."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequestError
from .jinja import compile_template, reads_parts, run_template
from .messages import check_messages, check_tools, check_variables, refusal
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate"]

END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A model's chat template, or its named set of templates (`{"default": ..., "tool_use": ...}`).

    `special_tokens` maps further roles (`unk_token`, ...) to tokens that templates may name.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        named = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {role: token for role, token in named.items() if token is not None}

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, source: str | Mapping[str, str]) -> "ChatTemplate":
        """A template that may name the special tokens of `tokenizer`."""
        return cls(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )

    def compile(self) -> None:
        """Compiles ahead of the first `render`, which takes tens of milliseconds; not needed otherwise."""
        for source in (self.source,) if isinstance(self.source, str) else self.source.values():
            compile_template(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; it has the special tokens in it, so encode it without adding any.

        `messages`: mappings with a string `role`; `content` is a string or a list of text parts (which
        a template that does not read lists gets as one string, joined by newlines). `tools`: their JSON
        schemas. `chat_template`: another template, or the name of one of the model's.
        `continue_final_message`: the prompt ends inside the last message, for the model to go on with it.
        Other keywords are variables for the template; `check_variables` readies them where they come as a
        mapping. A template of a caller who is not trusted belongs in a thread (see `jinja`).

        Raises `InvalidRequestError` naming the argument that is wrong; what a template itself refuses
        is blamed on `messages`.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message=True needs add_generation_prompt=False: the prompt ends either "
                "inside the last message or at the beginning of a new one",
                parameter="continue_final_message",
                value=True,
            )
        given = check_variables(variables)
        source = self._choose(chat_template, bool(tools))
        template = compile_template(source)
        chat = check_messages(messages, takes_parts=reads_parts(source))
        ending = _mark_ending(chat, source) if continue_final_message else None
        fixed = {
            "messages": chat,
            "tools": check_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        text = run_template(template, {**self._tokens, **given, **fixed})
        return text if ending is None else _cut_at_ending(text, ending)

    def _choose(self, wanted: str | None, tools: bool) -> str:
        sources = self.source
        if wanted is not None and not isinstance(wanted, str):
            raise refusal("chat_template", wanted, "must be a string")
        if isinstance(sources, str):
            return sources if wanted is None else wanted
        if wanted is not None:
            return sources.get(wanted, wanted)
        for name in ("tool_use", "default") if tools else ("default",):
            if name in sources:
                return sources[name]
        raise InvalidRequestError(
            f"the model has several chat templates and none is the default; pass chat_template= with the "
            f"name of one: {', '.join(sorted(sources))}",
            parameter="chat_template",
            value=None,
        )


def _mark_ending(chat: list[dict[str, Any]], source: str) -> str:
    """Puts a tag at the end of the last message, to cut there; returns the text before the tag."""
    message = chat[-1]
    content = message.get("content")
    text = content[-1]["text"] if isinstance(content, list) and content else content
    if not isinstance(text, str):
        raise refusal(
            "continue_final_message", True, "needs a last message with a text content to go on with"
        )
    if "content" not in source:
        raise refusal("continue_final_message", True, "needs a chat template that reads 'content'")
    if isinstance(content, list):
        content[-1]["text"] = text + END_TAG
    else:
        message["content"] = text + END_TAG
    return text


def _cut_at_ending(text: str, ending: str) -> str:
    at = text.rfind(END_TAG.strip())
    if at < 0 or ending.strip() not in text:
        raise refusal(
            "continue_final_message",
            True,
            "cannot be: the chat template leaves out or alters the last message",
        )
    # A template that trims messages has trimmed the tag's space; it would have trimmed the message's too.
    return text[:at] if text.startswith(END_TAG, at) else text[:at].rstrip()
