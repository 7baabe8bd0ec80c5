"""The chat page in a real browser: send, stream, stop, edit, retry, reload, errors, keys, a phone's width."""

import json

import pytest

from helpers.browser import browsing, needs_browser, until
from helpers.servers import CHAT, serving, small_model, user

pytestmark = [needs_browser, pytest.mark.slow]

MARKDOWN = """# Title

Some **bold**, `code`, [a link](https://example.org), [another](javascript:alert(1)) <img src=x onerror=alert(1)>

- one
  - nested
- two

1. first

```python
a < b
```

| a | b |
|---|---|
| 1 | **2** |

> quoted
"""


@pytest.fixture(scope="module")
def page():
    """A server, and a browser that shows its page."""
    with serving(small_model()) as client, browsing() as driver:
        yield Page(driver, client)


@pytest.fixture(autouse=True)
def fresh(request):
    """Begin with a browser that has kept nothing."""
    page = request.getfixturevalue("page") if "page" in request.fixturenames else None
    if page is not None:
        page.open()
        page.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        page.open()


class Page:
    """What a person does with the page."""

    def __init__(self, driver, client) -> None:
        self.driver = driver
        self.client = client

    def open(self) -> None:
        self.driver.get(str(self.client.base_url))
        until(self.driver, lambda: self.text("model") or not self.element("notice").get_attribute("hidden"))

    def element(self, id: str):
        return self.driver.find_element("id", id)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, id: str) -> str:
        return self.element(id).text

    def set(self, id: str, value: object) -> None:
        if not self.element(id).is_displayed():
            self.element("open-settings").click()
        self.element(id).clear()
        self.element(id).send_keys(str(value))

    def send(self, text: str) -> None:
        self.element("message").send_keys(text + "\n")

    def answered(self) -> list[str]:
        """Wait for the end of an answer, and return the texts of all messages."""
        until(self.driver, lambda: self.element("send").is_displayed() and self.all(".message.assistant .tools span"))
        return [body.get_attribute("textContent") for body in self.all(".message .body")]

    def press(self, label: str, place: int = -1) -> None:
        [button for button in self.all(".tools button") if button.text == label][place].click()


def test_an_answer_is_the_servers_and_is_there_after_a_reload(page):
    page.set("max_tokens", 24)
    page.set("temperature", 0)
    page.send("hello there")
    texts = page.answered()
    body = {"messages": user("hello there"), "max_tokens": 24, "temperature": 0}
    own = page.client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert texts[0] == "hello there"
    assert "".join(texts[1].split()) == "".join(own.split())
    assert "24 tokens" in page.all(".tools span")[0].text
    assert page.text("spoken").startswith("The model said")
    page.open()
    assert [body.get_attribute("textContent") for body in page.all(".message .body")] == texts
    assert page.element("max_tokens").get_attribute("value") == "24"
    assert not [line for line in page.driver.get_log("browser") if line["level"] == "SEVERE"]


def test_a_second_turn_sends_the_first(page):
    page.set("max_tokens", 4)
    page.send("hello")
    page.answered()
    page.send("again")
    until(page.driver, lambda: len(page.all(".message.assistant .tools span")) == 2)
    kept = json.loads(page.driver.execute_script("return localStorage.getItem('moeflow.conversations')"))
    assert [message["role"] for message in kept[0]["messages"]] == ["user", "assistant"] * 2
    prompt = page.all(".tools span")[1].text
    assert "prompt tokens" in prompt


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_ends_the_answer_here_and_on_the_server(page, by):
    page.send("hello")
    until(page.driver, lambda: page.element("stop").is_displayed() and len(page.all(".message .body")) == 2)
    until(page.driver, lambda: page.all(".message.assistant .body")[0].text)
    if by == "button":
        page.element("stop").click()
    else:
        page.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    text = page.answered()[1]
    assert page.all(".tools span")[0].text == "Stopped."
    assert text
    until(page.driver, lambda: page.client.get("/stats").json()["engine"]["running"] == 0)


def test_edit_takes_a_message_back_and_retry_asks_again(page):
    page.set("max_tokens", 4)
    page.send("hello")
    first = page.answered()
    page.press("Retry")
    until(page.driver, lambda: page.element("send").is_displayed() and page.all(".message.assistant .tools span"))
    assert page.answered()[0] == first[0]
    page.press("Edit")
    until(page.driver, lambda: not page.all(".message"))
    assert page.element("message").get_attribute("value") == "hello"


def test_conversations_are_kept_apart_and_deleted(page):
    page.set("max_tokens", 4)
    page.send("first one")
    page.answered()
    page.element("new-conversation").click()
    until(page.driver, lambda: not page.all(".message"))
    page.send("second one")
    page.answered()
    titles = [button.text for button in page.all("#conversation-list .title")]
    assert titles == ["second one", "first one"]
    page.all("#conversation-list .title")[1].click()
    until(page.driver, lambda: page.all(".message .body")[0].text == "first one")
    page.driver.find_element("css selector", "[aria-label='Delete first one']").click()
    until(page.driver, lambda: [button.text for button in page.all("#conversation-list .title")] == ["second one"])


def test_what_the_server_refuses_is_told_and_the_page_goes_on(page):
    page.set("max_tokens", 4)
    page.send("x" * 4100)
    until(page.driver, lambda: "positions" in page.text("notice"))
    page.press("Edit")
    page.element("message").clear()
    page.send("hello")
    assert len(page.answered()) == 2
    assert not page.element("notice").is_displayed()


def test_a_schema_that_is_no_json_is_told_before_it_is_sent(page):
    page.set("schema", '{"type": ')
    assert "No JSON" in page.text("schema-error")
    page.send("hello")
    until(page.driver, lambda: "no JSON" in page.text("notice"))


def test_figures_of_the_engine_are_shown(page):
    page.set("max_tokens", 4)
    page.send("hello")
    page.answered()
    until(page.driver, lambda: " of " in page.text("figure-kv") and page.text("figure-waiting") == "0 (0 run)")


def test_markdown_becomes_nodes_and_never_html(page):
    messages = [{"role": "user", "content": "<b>x</b>"}, {"role": "assistant", "content": MARKDOWN}]
    kept = json.dumps([{"id": "a", "messages": messages}])
    page.driver.execute_script("localStorage.setItem('moeflow.conversations', arguments[0])", kept)
    page.open()
    body = page.all(".message.assistant .body")[0]
    tags = ("h3", "strong", "p code", "a", "img", "ul > li > ul > li", "ol > li", "pre code", "td", "blockquote")
    found = {tag: [one.text for one in body.find_elements("css selector", tag)] for tag in tags}
    assert found == {
        "h3": ["Title"],
        "strong": ["bold", "2"],
        "p code": ["code"],
        "a": ["a link"],
        "img": [],
        "ul > li > ul > li": ["nested"],
        "ol > li": ["first"],
        "pre code": ["a < b"],
        "td": ["1", "2"],
        "blockquote": ["quoted"],
    }
    assert "<img src=x onerror=alert(1)>" in body.text
    assert page.all(".message.user .body")[0].text == "<b>x</b>"


def test_the_page_is_one_response_and_asks_only_its_server(page):
    page.driver.execute_script("performance.clearResourceTimings()")
    page.set("max_tokens", 4)
    page.send("hello")
    page.answered()
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert names
    assert all(name.startswith(str(page.client.base_url)) for name in names)
    policy = page.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_field_and_button_has_a_name_for_screen_readers(page):
    page.element("open-settings").click()
    controls = [control for control in page.all("button, input, textarea") if control.is_displayed()]
    assert len(controls) > 10
    assert [control.get_attribute("id") for control in controls if not control.accessible_name] == []


def test_a_key_is_asked_for_and_kept_for_the_tab():
    with serving(small_model(), api_key="secret") as client, browsing() as driver:
        page = Page(driver, client)
        page.open()
        until(driver, lambda: "API key" in page.text("notice"))
        page.set("key", "secret")
        until(driver, lambda: page.text("model") == "org/tiny")
        page.set("max_tokens", 4)
        page.send("hello")
        assert len(page.answered()) == 2
        page.open()
        until(driver, lambda: page.text("model") == "org/tiny")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(dark):
    with serving(small_model()) as client, browsing(390, 800) as driver:
        page = Page(driver, client)
        page.open()
        if dark:
            page.element("theme").click()
        page.set("max_tokens", 40)
        page.element("close-settings").click()
        page.send("hello " * 30)
        page.answered()
        assert driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        for id in ("message", "send", "theme", "open-settings", "open-conversations"):
            box = page.element(id).rect
            assert box["x"] >= 0, id
            assert box["x"] + box["width"] <= 390, id
        assert not page.element("conversation-list").is_displayed()
        page.element("open-conversations").click()
        until(driver, lambda: page.all("#conversation-list .title")[0].is_displayed())
        colours = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert (sum(map(int, colours[1][4:-1].split(","))) < 200) is dark
