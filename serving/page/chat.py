"""The page at / to try the model: a chat whose tokens tell how likely they were and to which experts they went."""

from serving.page.assembly import assembled

SCRIPTS = ["base.js", "stream.js", "routing.js", "answer.js", "panel.js", "log.js", "chat.js"]
PAGE = assembled("chat.html", ["base.css", "chat.css"], SCRIPTS)
