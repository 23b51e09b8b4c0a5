"""The page: SFT and DFT side by side, token by token. `page.py` and `server.py` alone import gradio.

session.py    the models: one base in memory, answers streamed in step, probabilities of tokens
text.py       text that others wrote, as HTML that can do nothing
views.py      what is seen: answers, coloured tokens, samples
results.py    the report of recorded runs, drawn without a model
votes.py      the blind vote's file and its count
page.py       components and events;  server.py  limits, headers, launch;  style.css, keys.js
"""
