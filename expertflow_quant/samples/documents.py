"""Forms, invoices, letters, tables and receipts, with everything that can be asked about them."""

import random
from collections.abc import Callable

from expertflow_quant.samples import words
from expertflow_quant.samples.canvas import SIZE, Canvas, Color
from expertflow_quant.samples.item import Question

PAPERS: tuple[Color, ...] = (
    (255, 255, 255),
    (255, 255, 255),
    (252, 250, 240),
    (246, 246, 246),
    (240, 246, 252),
)
TEXT_FONTS = ("Aileron", "Aileron", "DejaVuSans", "DejaVuSerif")
PAPER = 11
GRAY: Color = (150, 150, 150)


def code(rng: random.Random) -> str:
    """An identifying number."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 6)))


def price(rng: random.Random, high: int = 4000) -> int:
    """A price in cents."""
    return rng.randint(100, high)


def money(cents: int) -> str:
    """Cents as printed."""
    return f"{cents // 100}.{cents % 100:02d}"


def heading(rng: random.Random, canvas: Canvas, title: str) -> float:
    """The title on top; returns the first free line's y."""
    centred = rng.random() < 0.5
    canvas.text(SIZE / 2 if centred else 6, 4, title, PAPER, anchor="m" if centred else "l")
    if rng.random() < 0.6:
        canvas.draw.line([(5, 21), (SIZE - 5, 21)], fill=GRAY)
    return 26.0


def draw_form(rng: random.Random, canvas: Canvas, title: str) -> list[Question]:
    """Labelled fields in one of three layouts."""
    top = heading(rng, canvas, title)
    known = {
        "Name": words.person(rng),
        "Date": words.date(rng),
        "City": rng.choice(words.CITIES),
        "Country": rng.choice(words.COUNTRIES),
        "Phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
        "Number": code(rng),
        "Age": str(rng.randint(18, 90)),
        "Job": rng.choice(words.JOBS),
        "Fee": money(price(rng, 20000)),
        "Agent": words.person(rng),
    }
    fields = rng.sample(list(known), rng.randint(4, 6))
    layout = rng.randrange(3)
    row = (SIZE - top - 4) / len(fields)
    for i, label in enumerate(fields):
        y = top + row * i + row / 2 - 8
        if layout == 0:
            width = canvas.text(8, y, label + ":", PAPER)
            canvas.text(8 + width + 5, y, known[label], PAPER, row=label)
        elif layout == 1:
            canvas.text(8, y, label, PAPER)
            canvas.draw.rectangle([64, y - 2, SIZE - 8, y + 15], outline=GRAY)
            canvas.text(69, y, known[label], PAPER, row=label)
        else:
            canvas.text(8, y, label, PAPER)
            canvas.text(SIZE - 8, y, known[label], PAPER, anchor="r", row=label)
            canvas.draw.line([(6, y + 17), (SIZE - 6, y + 17)], fill=(215, 215, 215))
    asked = [
        Question("date" if f == "Date" else "field", f"What is the {f.lower()} on the form?", (known[f],))
        for f in fields
    ]
    return [*asked, Question("title", "What is the title of the form?", (title,))]


def draw_invoice(rng: random.Random, canvas: Canvas, title: str) -> list[Question]:
    """A company's invoice: number, date, customer, lines, total."""
    top = heading(rng, canvas, title)
    number, when, customer = code(rng), words.date(rng), words.person(rng)
    for i, (label, value) in enumerate((("Invoice", number), ("Date", when), ("Bill to", customer))):
        width = canvas.text(8, top + 15 * i, label + ":", PAPER)
        canvas.text(8 + width + 5, top + 15 * i, value, PAPER, row=label)
    goods = rng.sample(words.PRODUCTS, rng.randint(2, 4))
    counts = [rng.randint(1, 9) for _ in goods]
    prices = [price(rng) for _ in goods]
    top += 50
    for x, text, anchor in ((8, "Item", "l"), (92, "Qty", "m"), (SIZE - 8, "Price", "r")):
        canvas.text(x, top, text, PAPER, anchor=anchor)
    canvas.draw.line([(6, top + 16), (SIZE - 6, top + 16)], fill=GRAY)
    for i, name in enumerate(goods):
        y = top + 19 + 16 * i
        canvas.text(8, y, name, PAPER)
        canvas.text(92, y, str(counts[i]), PAPER, anchor="m", row=name, column="Qty")
        canvas.text(SIZE - 8, y, money(prices[i]), PAPER, anchor="r", row=name, column="Price")
    y = top + 24 + 16 * len(goods)
    canvas.draw.line([(100, y - 2), (SIZE - 6, y - 2)], fill=GRAY)
    total = money(sum(prices))
    canvas.text(104, y, "Total", PAPER)
    canvas.text(SIZE - 8, y, total, PAPER, anchor="r", row="Total")
    asked = [
        Question("field", "What is the invoice number?", (number,)),
        Question("date", "What is the date of the invoice?", (when,)),
        Question("field", "Who is the invoice billed to?", (customer,)),
        Question("total", "What is the total of the invoice?", (total,)),
        Question("title", "Which company sent the invoice?", (title,)),
    ]
    for i, name in enumerate(goods):
        asked.append(Question("price", f"What is the price of {name}?", (money(prices[i]),)))
        asked.append(Question("quantity", f"What is the quantity of {name}?", (str(counts[i]),)))
    return asked


def draw_letter(rng: random.Random, canvas: Canvas, title: str) -> list[Question]:
    """A company's letter: date, subject, greeting, three lines, signature."""
    top = heading(rng, canvas, title)
    when, subject, sender = words.date(rng), rng.choice(words.SUBJECTS), words.person(rng)
    reader = words.person(rng)
    while reader == sender:
        reader = words.person(rng)
    right = rng.random() < 0.5
    canvas.text(SIZE - 8 if right else 8, top, when, PAPER, anchor="r" if right else "l")
    width = canvas.text(8, top + 19, "Subject:", PAPER)
    canvas.text(8 + width + 5, top + 19, subject, PAPER)
    canvas.text(8, top + 39, f"Dear {reader},", PAPER)
    for i, phrase in enumerate(rng.sample(words.PHRASES, 3)):
        canvas.text(8, top + 57 + 15 * i, phrase, PAPER)
    canvas.text(8, top + 109, rng.choice(("Sincerely,", "Regards,", "Yours,")), PAPER)
    canvas.text(8, top + 126, sender, PAPER)
    return [
        Question("date", "What is the date of the letter?", (when,)),
        Question("field", "What is the subject of the letter?", (subject,)),
        Question("name", "Who is the letter addressed to?", (reader,)),
        Question("name", "Who signed the letter?", (sender,)),
        Question("title", "Which company sent the letter?", (title,)),
    ]


def draw_table(rng: random.Random, canvas: Canvas, title: str) -> list[Question]:
    """Names in rows, two or three numbers in columns."""
    top = heading(rng, canvas, title)
    noun = rng.choice(("country", "city", "product", "fruit", "sport"))
    names = rng.sample([n for n in words.CATEGORIES[noun] if len(n) <= 7], rng.randint(3, 6))
    pool = rng.choice((words.YEARS, words.MONTHS, words.DAYS, [s for s in words.SERIES if len(s) <= 5]))
    columns = rng.sample(pool, rng.randint(2, 3))
    cells = [[str(rng.randint(2, 999 if rng.random() < 0.3 else 99)) for _ in columns] for _ in names]
    row = min(26.0, (SIZE - top - 4) / (len(names) + 1))
    edges = [98 + (SIZE - 106) * j / (len(columns) - 1) for j in range(len(columns))]
    canvas.text(8, top, noun.capitalize(), PAPER)
    for column, x in zip(columns, edges, strict=True):
        canvas.text(x, top, column, PAPER, anchor="r")
    canvas.draw.line([(5, top + 16), (SIZE - 5, top + 16)], fill=GRAY)
    ruled = rng.random() < 0.4
    for i, name in enumerate(names):
        y = top + row * (i + 1)
        canvas.text(8, y, name, PAPER)
        for j, x in enumerate(edges):
            canvas.text(x, y, cells[i][j], PAPER, anchor="r", row=name, column=columns[j])
        if ruled:
            canvas.draw.line([(5, y + 16), (SIZE - 5, y + 16)], fill=(215, 215, 215))
    asked = [
        Question("cell", f"What is the value of {names[i]} in {columns[j]}?", (cells[i][j],))
        for i in range(len(names))
        for j in range(len(columns))
    ]
    return [*asked, Question("title", "What is the title of the table?", (title,))]


def draw_receipt(rng: random.Random, canvas: Canvas, title: str) -> list[Question]:
    """A shop's receipt: date, goods with prices, total, means of payment."""
    canvas.font = rng.choice(("DejaVuSansMono", canvas.font, canvas.font))
    size = PAPER if canvas.font != "DejaVuSansMono" else 10
    canvas.text(SIZE / 2, 4, title, PAPER, anchor="m", font="Aileron")
    when, clock = words.date(rng), f"{rng.randint(8, 21)}:{rng.randint(0, 59):02d}"
    canvas.text(8, 22, when, size)
    canvas.text(SIZE - 8, 22, clock, size, anchor="r")
    goods = rng.sample(words.PRODUCTS, rng.randint(2, 5))
    prices = [price(rng) for _ in goods]
    for i, name in enumerate(goods):
        canvas.text(8, 44 + 17 * i, name, size)
        canvas.text(SIZE - 8, 44 + 17 * i, money(prices[i]), size, anchor="r", row=name)
    y = 50 + 17 * len(goods)
    canvas.draw.line([(6, y - 3), (SIZE - 6, y - 3)], fill=GRAY)
    total = money(sum(prices))
    canvas.text(8, y, "TOTAL", size)
    canvas.text(SIZE - 8, y, total, size, anchor="r", row="TOTAL")
    means = rng.choice(("Cash", "Card", "Check", "Voucher"))
    canvas.text(8, y + 18, "Paid by", size)
    canvas.text(SIZE - 8, y + 18, means, size, anchor="r", row="Paid")
    asked = [
        Question("price", f"What is the price of {name}?", (money(p),)) for name, p in zip(goods, prices, strict=True)
    ]
    return [
        *asked,
        Question("total", "What is the total of the receipt?", (total,)),
        Question("date", "What is the date of the receipt?", (when,)),
        Question("field", "What is the time on the receipt?", (clock,)),
        Question("field", "How was the receipt paid?", (means,)),
        Question("count", "How many items are on the receipt?", (str(len(goods)),)),
        Question("title", "What is the name of the shop?", (title,)),
    ]


FAMILIES: dict[str, tuple[Callable[[random.Random], str], Callable[[random.Random, Canvas, str], list[Question]]]] = {
    "form": (words.form_title, draw_form),
    "invoice": (words.company, draw_invoice),
    "letter": (words.company, draw_letter),
    "table": (words.chart_title, draw_table),
    "receipt": (words.company, draw_receipt),
}


def new_page(rng: random.Random) -> Canvas:
    """An empty sheet."""
    return Canvas(rng.choice(PAPERS), rng.choice(TEXT_FONTS))
