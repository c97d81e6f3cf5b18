"""Chat templates: the built-in ones, and a checkpoint's own, run where nothing can be reached.

A template is a program that somebody else wrote: it runs in Jinja's sandbox, with a limit on time,
numbers and the length of what it writes.
"""
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

import bounds
import strict

TODAY = datetime.datetime(2024, 7, 26)  # for strftime_now: where it has none, Llama 3.2 says this
SECONDS = 0.5  # of computing for a template
TEMPLATES = {  # by name; "checkpoint" is the one that comes with the model or the adapter
    "mistral-inst": """{{ bos_token }}{% set lead = namespace(text='') %}{% for m in messages %}\
{% if m.role == 'system' %}{% set lead.text = m.content + '\n\n' %}{% elif m.role == 'user' %}\
{{ '[INST] ' + lead.text + m.content + ' [/INST]' }}{% set lead.text = '' %}{% else %}\
{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}""",
    "chatml": """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + \
m.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "alpaca": """{{ bos_token }}{% if messages[0].role != 'system' %}\
{{ 'Below is an instruction that describes a task. Write a response that appropriately completes \
the request.\\n\\n' }}{% endif %}{% for m in messages %}{% if m.role == 'system' %}\
{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}\
{{ '### Instruction:\\n' + m.content + '\\n\\n' }}{% else %}\
{{ '### Response:\\n' + m.content + eos_token + '\\n\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}""",
    "plain": """{{ bos_token }}{% for m in messages %}{{ m.content }}\
{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}""",
}


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without a way out, and without the operators that make much of little."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        """Numbers of a usual size only; % also formats."""
        small = all(isinstance(x, int | float) and abs(x) < 1e9 for x in (left, right))
        if operator == "**" or not small and not (operator == "%" and isinstance(left, str)):
            raise TemplateError(f"{operator} of {strict.show(left)} and {strict.show(right)}")
        return super().call_binop(context, operator, left, right)


def template_source(folders: Sequence[Path], name: str) -> str:
    """The Jinja text of template `name`; "checkpoint" looks into the folders, in order."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "checkpoint":
        raise ValueError(f"--template {name} is unknown; choose checkpoint, {', '.join(TEMPLATES)}")
    for folder in folders:
        if strict.exists(folder / "chat_template.jinja"):
            return strict.read_text(folder / "chat_template.jinja", 1 << 20)
        own = given = strict.optional_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(own, list) and all(isinstance(t, dict) for t in own):
            own = {t.get("name"): t.get("template") for t in own}.get("default", "" if not own
                                                                      else given)
        if own and not isinstance(own, str):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is "
                             f"{strict.show(given)}, expected a text, or named texts with default")
        if own:
            return own
    raise ValueError(f"{folders[-1]} has no chat template: choose one with --template "
                     f"{' | '.join(TEMPLATES)} (the paper's Mistral runs use mistral-inst)")


def compile_template(source: str) -> Template:
    """A Jinja template in the sandbox, with the settings and names transformers gives it."""
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True,
                          extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime  # a run has one prompt, any day
    try:
        with bounds.deadline(SECONDS):  # TRL's {% generation %} becomes the block that does nothing
            return environment.from_string(
                re.sub(r"({%[-+]?\s*(end)?)generation\b", r"\1with", source))
    except Exception as error:  # noqa: BLE001  (also of Python's compiler, behind Jinja's)
        raise ValueError(f"the chat template is broken: {strict.clean(error)}") from None


def fill(template: Template, messages: list[dict], generation: bool, bos: str, eos: str) -> str:
    """The text of a conversation.   ValueError where the template raises, or never comes to an
    end, or writes much more than it was told."""
    try:
        with bounds.deadline(SECONDS):
            text = template.render(messages=messages, add_generation_prompt=generation,
                                   bos_token=bos, eos_token=eos)
    except Exception as error:  # noqa: BLE001  (a template may raise anything)
        raise ValueError(f"the chat template refuses this conversation: "
                         f"{strict.clean(error) or type(error).__name__}. "
                         "Change the conversation, or choose another --template") from None
    if len(text) > 10 * sum(len(m["content"]) for m in messages) + 100_000:
        raise ValueError(f"the chat template makes {len(text)} characters of this conversation: "
                         "choose another --template")
    return text
