"""Screenshots of every tab at 1280 and 390 px, light and dark: `python docs/screenshots/make.py [RUN ...]`.

It needs Chromium, chromedriver and selenium, and serves the page on a free port while it runs.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from dft_lora.runs.folder import RunFolder
from dft_lora.ui.server import default_runs, launch
from dft_lora.ui.session import Session
from dft_lora.ui.votes import Ballot
from dft_lora.ui.workshop import Workshop

OUT = Path(__file__).parent
SIZES = {1280: 900, 390: 844}
LONGEST = 3600  # pixels of a page that are shown
QUICK = ("train.batch_size=4", "train.micro_batch_size=4", "train.max_steps=8", "train.save_steps=1")
READY = {  # tab -> (what to press there, what the page shows once it is done)
    "Compare": (
        "#go",
        "document.querySelector('#answers .chip') && !document.querySelector('#answers .chip.wait')",
    ),
    "Train": ("#start", "document.querySelector('#live .chip.good') && document.querySelector('#trained p')"),
    "Tokens": (None, "document.querySelector('#strips .t')"),
    "Steps": (None, "document.querySelector('#film .t')"),
    "Samples": (
        "#draw",
        "document.querySelector('#tallies .big') && !document.querySelector('#tallies progress')",
    ),
    "Results": (None, "document.querySelector('#report table, #report svg')"),
    "Vote": ("#new-pair", "document.querySelector('#pair .card')"),
}


def main(run_dirs: list[str]) -> None:
    folders = [RunFolder.open(path) for path in run_dirs] or default_runs()
    session = Session(folders)
    with tempfile.TemporaryDirectory() as votes:  # and trainings
        workshop = Workshop(Path(votes, "page"), QUICK)
        page = launch(folders, session, Ballot(Path(votes, "votes.jsonl"), session.identities), workshop)
        shoot(page.local_url)
        page.close(verbose=False)


def shoot(url: str) -> None:
    """Fill each tab once, and take it in every size and scheme."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        resize(driver, 1280, SIZES[1280])
        driver.get(url)
        wait(driver, "document.querySelectorAll('#answers .card').length")
        for tab, (press, ready) in READY.items():
            tabs = "[...document.querySelectorAll('button[role=tab]')]"
            driver.execute_script(f"{tabs}.find(b => b.innerText.trim() == '{tab}').click()")
            if press:
                wait(driver, f"document.querySelector('{press}')")
                time.sleep(0.5)  # a tab's buttons listen a frame after it opens
                driver.execute_script(f"document.querySelector('{press}').click()")
            wait(driver, ready)
            for width, height in SIZES.items():
                for scheme in ("light", "dark"):
                    dark = str(scheme == "dark").lower()
                    driver.execute_script(f"document.body.classList.toggle('dark', {dark})")
                    resize(driver, width, height)
                    time.sleep(0.7)  # colours fade in
                    whole = driver.execute_script("return document.documentElement.scrollHeight")
                    resize(driver, width, min(LONGEST, max(height, whole)))
                    time.sleep(0.3)
                    driver.save_screenshot(str(OUT / f"{tab.lower()}-{width}-{scheme}.png"))
            driver.execute_script("document.body.classList.remove('dark')")
            resize(driver, 1280, SIZES[1280])
    finally:
        driver.quit()


def resize(driver, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(driver, condition: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not driver.execute_script(f"return Boolean({condition})"):
        if time.monotonic() > end:
            sys.exit(f"gave up after {seconds:.0f} s: {condition}")
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
