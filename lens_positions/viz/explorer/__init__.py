"""The explorer: take a gap between two tokens, pull, and see what the model does.

state.py     a request as plain JSON: a model, a text, edits, and what is looked at
edits.py     edits as hooks, as a sentence and as lines of Python
engine.py    from a state to what the model does before and after its edits
page.py      the page: one HTML, its styles and its scripts, and the still of it
server.py    the page in a browser, on this machine alone
web/         what the browser runs; the notebook widget (`viz/widget.py`) runs the same
"""
