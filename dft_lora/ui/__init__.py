"""The page: SFT and DFT side by side, token by token. Start reading at `page.py`.

page.py       the page: its heading and its tabs;  server.py  limits, headers, launch
tabs/         one file per tab: components and events;  endpoints.py  the functions for gradio_client
events.py     what the events share;  theme.py, style.css  how the page looks;  page.js  what its browser does

These import gradio; the ones below do not.

session.py    the models: one base in memory, answers streamed in step, token probabilities
workshop.py   trainings: what a visitor may ask, one at a time, what the page shows of them
film.py       the checkpoints of runs, step by step
text.py       untrusted text as harmless HTML
views.py      answers, coloured tokens, samples and votes as HTML;  train_views.py  the same of trainings
results.py    the recorded results as HTML and CSV;  charts.py  their SVG
counts.py     shares with intervals;  votes.py  the file of blind votes
"""
