"""The explorer in a notebook: the page of `lens-positions explore` as a widget, and its edits in Python."""

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

from ..errors import PositionsError
from ..interventions import Hooks
from ..model import HookedPositionTransformer
from .explorer import page
from .explorer.engine import Explorer
from .explorer.state import read_edit, read_state


def explore(model: HookedPositionTransformer, text: str = page.TEXT, edits: Sequence[Mapping[str, Any]] = ()) -> "Any":
    """A widget to pull tokens apart and see what the model does: in JupyterLab, and wherever anywidget is shown.

    Args:
        model: the model; its edits are hooks of single passes, and nothing of them stays in it.
        text: what it reads first.
        edits: those that the widget begins with, as `widget.edits` gives them.

    Returns:
        The widget. `widget.text` and `widget.edits` are what is seen now, `widget.hooks()` the edits for
        `run_with_hooks`, and `widget.save("page.html")` writes a still of it.

    Raises:
        PositionsError: anywidget is not installed, or a text or an edit that cannot be.

    >>> edit = {"kind": "gap", "layers": [0], "token": 5, "by": 2.5}  # 2.5 positions more before token 5, at layer 0
    >>> widget = lp.viz.explore(model, "The cat", edits=[edit])
    >>> widget.edits == [edit]
    True
    >>> logits = model.run_with_hooks(widget.text, fwd_hooks=widget.hooks())
    """
    state = {"model": model.name, "text": text, "edits": [dict(edit) for edit in edits]}

    # A wrong edit is refused here, and not in the browser, which would show it to nobody.
    read_state(state)
    explorer = Explorer(model)
    return _widget_class()(explorer, state)


@cache
def _widget_class() -> Any:
    """The class of the widget, made when the first is: anywidget is no dependency of the package."""
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError as error:
        raise PositionsError(
            "the explorer in a notebook needs anywidget, which is not installed; expected pip install anywidget (or "
            "lens-positions[explore])."
        ) from error

    class ExplorerWidget(anywidget.AnyWidget):
        """The explorer of one model in a notebook.

        Attributes:
            state: what is seen, as the page of the server has it in its address.
            result: the last answer, for a notebook that is opened without its kernel.
        """

        _esm = f"{page.script()}\n{page.notebook_script()}"
        _css = page.file("explorer.css")
        state = traitlets.Dict().tag(sync=True)
        result = traitlets.Dict().tag(sync=True)

        def __init__(self, explorer: Explorer, state: dict[str, Any]) -> None:
            self._explorer = explorer
            super().__init__(state=state, result=explorer.run(state))
            self.on_msg(self._on_question)

        @property
        def text(self) -> str:
            """The text that the model reads."""
            return str(self.state["text"])

        @property
        def edits(self) -> list[dict[str, Any]]:
            """The edits, in the order in which they act."""
            return [read_edit(edit).as_json() for edit in self.state["edits"]]

        def hooks(self) -> Hooks:
            """The edits as hooks for one `run_with_hooks` on the text."""
            return self._explorer.hooks(self.text, tuple(read_edit(edit) for edit in self.state["edits"]))

        def save(self, path: Any) -> None:
            """Write a page that shows the text before and after the edits, and needs no model.

            Raises:
                PositionsError: a place that cannot be written.
            """
            from .interactive import write_page

            write_page(self._explorer.page(self._question()), path)

        def _question(self) -> dict[str, Any]:
            # Only what decides the answer: the page may keep more in its state.
            known = ("model", "text", "edits", "token", "layer", "head")
            return {name: self.state[name] for name in known if name in self.state}

        def _on_question(self, _widget: Any, message: dict[str, Any], _buffers: Any) -> None:
            """Answer a question of the page, under its number."""
            try:
                answer = self._answer(message.get("question"), message.get("state"))
            except PositionsError as error:
                answer = {"error": str(error)}
            self.send({"number": message.get("number"), "answer": answer})

        def _answer(self, question: Any, state: Any) -> Any:
            if question == "run":
                # Kept in the notebook, so that it shows the last answer when it is opened without a kernel.
                found = self._explorer.run(state)
                self.result = {"text": self.result["text"]} | found
                return found
            if question == "slopes":
                return self._explorer.slopes(state)
            if question == "page":
                return {"page": self._explorer.page(state)}
            if question == "circuits":
                return {"script": page.file("circuitsvis.js")}
            raise PositionsError(f"the question is {question!r:.40}; expected run, slopes, page or circuits.")

        def _repr_mimebundle_(self, **kwargs: Any) -> Any:
            """The widget, and a still of it for whatever shows notebooks without running widgets."""
            bundle = super()._repr_mimebundle_(**kwargs)
            data, more = bundle if isinstance(bundle, tuple) else (bundle, {})

            # A frame, so that neither the styles of the notebook nor those of the page reach the other.
            frame = (
                f'<iframe srcdoc="{escape(self._explorer.page(self._question()))}" title="The explorer, a still" '
                'style="width:100%;height:760px;border:0"></iframe>'
            )
            return {**(data or {}), "text/html": frame}, more

    return ExplorerWidget
