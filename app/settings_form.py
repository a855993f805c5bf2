"""Widgets for declared settings: which one, its label, help, bounds and default come from the declaration.

`app.state` keeps the values, since a form is not on every page. The settings themselves refuse a wrong value, as
on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from pydantic.fields import FieldInfo

from app import state, text
from es2.core.settings import Settings, entry_kind, extra, kind_of, label_of

PER_ROW = 4


@dataclass(frozen=True)
class SettingsForm:
    """The widgets of one kind of work.

    Attributes:
        settings: the declarations.
        prefix: of the widgets' keys, and the name under which `app.state` keeps the settings.
        names: what the values of a choice are called, by setting.
    """

    settings: type[Settings]
    prefix: str
    names: Mapping[str, Mapping[str, str]]

    def group(self, group: str, per_row: int = PER_ROW) -> dict[str, Any]:
        """Render all settings of a group in rows; returns their values, lists as the text that was typed."""
        names = [name for name, field in self.settings.model_fields.items() if extra(field, "group") == group]
        return self.rows(names, per_row)

    def rows(self, names: Sequence[str], per_row: int = PER_ROW) -> dict[str, Any]:
        """Render these settings in rows; returns their values, as `group` does."""
        values: dict[str, Any] = {}
        for start in range(0, len(names), per_row):
            columns = st.columns(per_row, gap="small", vertical_alignment="bottom")
            for column, name in zip(columns, names[start : start + per_row], strict=False):
                with column:
                    values[name] = self.one(name)
        return values

    def one(self, name: str, usual: Any = None) -> Any:
        """Render one setting and return its value.

        Args:
            name: the setting.
            usual: its value until one is set; the declared default if not given.
        """
        field = self.settings.model_fields[name]
        key = f"{self.prefix}_{name}"
        value = state.settings(self.prefix).get(name, field.default if usual is None else usual)
        kind, may_be_open = kind_of(field)
        if entry_kind(kind) is not None and isinstance(value, tuple):
            value = ",".join(map(str, value))
        if kind in (int, float) and value is not None:
            value = kind(value)  # the type of the value and of the step must agree
        st.session_state[key] = value
        arguments: dict[str, Any] = {
            "key": key,
            "help": text.markdown(str(field.description)),
            "on_change": lambda: state.take_setting(self.prefix, name, st.session_state[key]),
        }
        _widget(label_of(name, field), field, kind, may_be_open, self.names.get(name, {}), arguments)
        value = st.session_state[key]
        return None if may_be_open and value == "" else value


def start_button(label: str, key: str, *, disabled: bool) -> bool:
    """Whether the button that starts the work was pressed."""
    return st.button(label, key=key, type="primary", icon=":material/play_arrow:", disabled=disabled)


def _widget(
    label: str,
    field: FieldInfo,
    kind: Any,
    may_be_open: bool,
    names: Mapping[str, str],
    arguments: Mapping[str, Any],
) -> None:
    """Render the widget that suits a setting."""
    choices, suggestions = extra(field, "choices"), extra(field, "suggestions")
    if entry_kind(kind) is not None:
        st.text_input(label, placeholder="automatic" if may_be_open else None, **arguments)
    elif choices and not may_be_open:
        st.segmented_control(
            label, choices, format_func=lambda choice: names.get(choice, choice), required=True, width="stretch",
            **arguments,
        )  # fmt: skip
    elif choices:
        st.selectbox(label, choices, index=None, placeholder="automatic", **arguments)
    elif suggestions:
        value = st.session_state[arguments["key"]]
        options = list(dict.fromkeys([field.default, *suggestions, *([value] if value else [])]))
        st.selectbox(label, options, accept_new_options=True, **arguments)
    elif kind is bool:
        st.checkbox(label, **arguments)
    elif kind in (int, float):
        step, placeholder = kind(extra(field, "step") or 1), "automatic" if may_be_open else None
        opened = {"value": None} if may_be_open else {}
        number_input: Any = st.number_input  # whose overloads part whole numbers from others
        number_input(label, step=step, format=extra(field, "format"), placeholder=placeholder, **opened, **arguments)
    else:
        st.text_input(label, placeholder="automatic" if may_be_open else None, **arguments)
