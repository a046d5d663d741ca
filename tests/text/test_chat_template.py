"""Chat prompts against transformers' own rendering."""

import enum
import functools

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from asyncengine.errors import InvalidRequestError
from asyncengine.text.chat_template import ChatTemplate
from asyncengine.text.messages import check_variables

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
<|start_header_id|>system<|end_header_id|>

{{ "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}
    {%- endif %}{{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

PARTS = """{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{% endif %}{% generation %}{{ '~' }}{% endgeneration %}{% endfor %}"""

CONTROLS = """{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{{ m.content }}
{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{{ unk_token }}{{ missing }}
{{ strftime_now('%Y')[:2] }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "parts": PARTS,
    "controls": CONTROLS,
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "  What is 2 < 3 & 'x'? é 日本\n"},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "Why?"},
]
SYSTEM = [{"role": "system", "content": "Be brief. "}]
THOUGHT = [{"role": "assistant", "reasoning": "Hm.", "content": "Because.  "}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a < b & ü",
            "parameters": {"type": "object", "x": [1.5, None]},
        },
    }
]
CALL = [
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}],
    },
    {"role": "tool", "content": "3"},
]


def oracle(template, messages, **options):
    return render_jinja_template([messages], chat_template=template, **{**TOKENS, **options})[0][0]


def ours(template, messages, **options):
    return ChatTemplate(template, **TOKENS).render(messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(name, prompt):
    template = TEMPLATES[name]
    talks = [TALK, TALK[:1], [*TALK, *THOUGHT]]
    if name != "mistral":
        talks += [SYSTEM + TALK, SYSTEM + TALK + THOUGHT]
    for talk in talks:
        assert ours(template, talk, add_generation_prompt=prompt) == oracle(
            template, talk, add_generation_prompt=prompt
        )


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_tools_equal_transformers(name):
    for talk in (TALK, SYSTEM + TALK, TALK + CALL):
        expected = oracle(TEMPLATES[name], talk, tools=TOOLS, add_generation_prompt=True)
        assert ours(TEMPLATES[name], talk, tools=TOOLS) == expected
    as_text = [{**CALL[0], "content": None}, CALL[1]]
    as_text[0]["tool_calls"] = [{"function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}]
    assert ours(TEMPLATES[name], TALK + as_text) == oracle(
        TEMPLATES[name], TALK + CALL, add_generation_prompt=True
    )


def test_variables_reach_the_template():
    for name, extra in (("qwen3", {"enable_thinking": False}), ("llama3", {"date_string": "1 May"})):
        expected = oracle(TEMPLATES[name], TALK, add_generation_prompt=True, **extra)
        assert ours(TEMPLATES[name], TALK, **extra) == expected
    assert ours("{{ unk_token }}", TALK) == ""
    assert ChatTemplate("{{ unk_token }}", special_tokens={"unk_token": "<unk>"}).render(TALK) == "<unk>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "qwen3", "parts"])
@pytest.mark.parametrize("ending", ["Because", "Because ", " it  \n"])
def test_continuing_the_final_message_equals_transformers(name, ending):
    talk = [*TALK, {"role": "assistant", "content": ending}]
    expected = oracle(TEMPLATES[name], talk, continue_final_message=True)
    assert ours(TEMPLATES[name], talk, continue_final_message=True, add_generation_prompt=False) == expected
    assert expected.rstrip().endswith(ending.strip())


def test_text_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    talk = [{"role": "user", "content": parts}]
    assert ours(PARTS, talk) == oracle(PARTS, talk)
    joined = oracle(QWEN3, [{"role": "user", "content": "one\ntwo"}], add_generation_prompt=True)
    assert ours(QWEN3, talk) == joined
    assert talk == [{"role": "user", "content": parts}] and len(parts[1]) == 2
    continued = ours(PARTS, talk, continue_final_message=True, add_generation_prompt=False)
    assert continued == oracle(PARTS, talk, continue_final_message=True)


def test_demo_template(demo_gguf):
    from asyncengine.text.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(demo_gguf)
    for talk in (TALK, SYSTEM + TALK):
        expected = oracle(tokenizer.chat_template, talk, add_generation_prompt=True)
        assert ours(tokenizer.chat_template, talk) == expected
    assert tokenizer.encode(ours(tokenizer.chat_template, TALK))[0] == tokenizer.token_to_id("<|im_start|>")


def test_named_templates():
    named = ChatTemplate({"default": "d{{ messages[0].content }}", "tool_use": "t", "rag": "r"})
    named.compile()
    assert named.render(SYSTEM) == "dBe brief. "
    assert named.render(SYSTEM, tools=TOOLS) == "t"
    assert named.render(SYSTEM, chat_template="rag") == "r"
    assert named.render(SYSTEM, chat_template="{{ 1 + 1 }}") == "2"
    with pytest.raises(InvalidRequestError, match="rag, tool_use") as error:
        ChatTemplate({"rag": "r", "tool_use": "t"}).render(SYSTEM)
    assert error.value.parameter == "chat_template"


class Colour(enum.StrEnum):
    RED = "red"


def test_templates_see_plain_values_only():
    talk = [{"role": "user", "content": Colour.RED}]
    assert ours("{{ messages[0].content }}", talk) == "red"
    for bad in (object(), {1, 2}, b"x", {"a": object()}):
        with pytest.raises(InvalidRequestError) as error:
            ours("x", [{"role": "user", "content": "x", "extra": bad}])
        assert error.value.parameter == "messages"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        [],
        {},
        42,
        [None],
        ["hi"],
        [{}],
        [{"role": 3, "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", 5: "y"}],
        [{"role": "user", "content": "x", "deep": functools.reduce(lambda a, _: [a], range(99), [])}],
    ],
)
def test_bad_messages_are_refused(messages):
    with pytest.raises(InvalidRequestError) as error:
        ours(CHATML, messages)
    assert error.value.parameter == "messages"


@pytest.mark.parametrize("tools", ["x", {}, [1], [print], [{"a": object()}]])
def test_bad_tools_are_refused(tools):
    with pytest.raises(InvalidRequestError) as error:
        ours(CHATML, TALK, tools=tools)
    assert error.value.parameter == "tools"


def test_reserved_and_unfit_variables_are_refused():
    with pytest.raises(InvalidRequestError, match="tokenize"):
        ours(CHATML, TALK, tokenize=True)
    for bad in ({"messages": []}, {"add_generation_prompt": 1}, {3: 4}, [("a", 1)], "x", {"a": object()}):
        with pytest.raises(InvalidRequestError) as error:
            check_variables(bad)
        assert error.value.parameter == "chat_template_kwargs"
    assert check_variables(None) == {}


def test_what_the_template_refuses_is_said_in_its_words():
    with pytest.raises(InvalidRequestError, match="roles must alternate") as error:
        ours(MISTRAL, TALK[1:])
    assert error.value.parameter == "messages"
    with pytest.raises(InvalidRequestError):
        ours(CHATML, [{"role": "user"}])  # adds undefined content to a string


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ ", "{% unknown %}", "x" * 2_000_000, "{{ 1" + "0" * 9999 + " }}", 7]
)
def test_broken_templates_are_refused(source):
    with pytest.raises(InvalidRequestError) as error:
        ChatTemplate(CHATML).render(TALK, chat_template=source)
    assert error.value.parameter == "chat_template"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_are_stopped(source):
    with pytest.raises(InvalidRequestError):
        ours(source, TALK)


def test_continuing_is_refused_where_it_cannot_be():
    for options, template, talk in (
        ({"add_generation_prompt": True}, CHATML, TALK),
        ({"add_generation_prompt": False}, CHATML, [{"role": "assistant"}]),
        ({"add_generation_prompt": False}, "fixed", TALK),
        ({"add_generation_prompt": False}, "{{ messages[0].content[:3] }}", TALK),
    ):
        with pytest.raises(InvalidRequestError) as error:
            ours(template, talk, continue_final_message=True, **options)
        assert error.value.parameter == "continue_final_message"
