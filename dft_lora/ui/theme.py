"""The page's colours, fonts and borders, for Gradio. The page's own HTML takes its colours from style.css."""

from __future__ import annotations

import gradio as gr

SYSTEM_FONT = ("ui-sans-serif", "system-ui", "sans-serif")
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    font=SYSTEM_FONT,
    font_mono=("ui-monospace", "monospace"),
    radius_size=gr.themes.sizes.radius_md,
).set(
    body_background_fill="#faf9f7",
    body_background_fill_dark="#151513",
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_border_width="0px",
    block_border_width_dark="0px",
    block_shadow="none",
    block_padding="0px",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    input_background_fill="#ffffff",
    input_background_fill_dark="#1f1f1c",
    input_border_color="#cfcac2",
    input_border_color_dark="#4a4943",
    input_border_width="1px",
    slider_color="#0f5f5a",
    slider_color_dark="#5fd0c3",
    checkbox_background_color_selected="#0f5f5a",
    checkbox_background_color_selected_dark="#0f5f5a",
    checkbox_label_background_fill="transparent",
    checkbox_label_background_fill_dark="transparent",
    checkbox_label_background_fill_selected="#ffffff",
    checkbox_label_background_fill_selected_dark="#1f1f1c",
    checkbox_label_border_color="#cfcac2",
    checkbox_label_border_color_dark="#4a4943",
    checkbox_label_border_width="1px",
    button_secondary_background_fill="#e9e5de",
    button_secondary_background_fill_hover="#ded9d0",
    button_secondary_background_fill_dark="#33322d",
    button_secondary_background_fill_hover_dark="#42413a",
    button_primary_background_fill="#0f5f5a",
    button_primary_background_fill_hover="#0b4a46",
    button_primary_background_fill_dark="#5fd0c3",
    button_primary_background_fill_hover_dark="#7fdcd1",
    button_primary_text_color="#ffffff",
    button_primary_text_color_dark="#06201e",
)
