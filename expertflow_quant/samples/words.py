"""The vocabulary of the generated charts and documents."""

import random

COUNTRIES = (
    "Asia Peru Fiji Iran Mali Cuba Oman Chad Laos Togo Chile Kenya India Japan Spain Italy Egypt Nepal Qatar Ghana "
    "Brazil Canada Norway Poland Sweden Turkey Greece France Jordan Malta"
).split()
CITIES = (
    "Oslo Rome Lima Bonn Cork Nice York Bath Graz Turin Paris Tokyo Delhi Milan Lyon Porto Seoul Cairo Quito Dakar "
    "Boston London Madrid Berlin Vienna Prague Dublin Zurich Geneva Austin"
).split()
PRODUCTS = (
    "Milk Rice Bread Tea Soap Lamp Desk Chair Pen Book Shoes Hat Coat Cup Fork Apple Lemon Pasta Sugar Salt Honey "
    "Juice Cheese Butter Paper Glue Rope Nails Paint Brush Clock Phone Cable Mouse Radio Torch"
).split()
FRUITS = "Apple Pear Plum Kiwi Fig Lime Lemon Mango Peach Grape Melon Cherry Banana Orange Papaya".split()
SPORTS = "Golf Judo Polo Yoga Rugby Tennis Hockey Soccer Boxing Karate Rowing Diving Skiing".split()
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
YEARS = [str(year) for year in range(1998, 2027)]
SERIES = "Men Women Boys Girls Urban Rural North South East West Online Store Cars Bikes Gas Oil Wind Solar".split()
FIRST_NAMES = (
    "Anna Tom Lucy Mark Sara Paul Nina Carl Emma Hugo Ruth Ivan Clara Peter Laura David Julia Simon Alice Oscar "
    "Helen Frank Maria Kevin Sofia Bruno Diana Felix Irene Victor"
).split()
LAST_NAMES = (
    "Smith Brown Jones Clark Lewis Young Hall King Wright Hill Green Adams Baker Nelson Carter Evans Parker Collins "
    "Reed Cook Bell Ward Cox Gray James Watson Brooks Kelly Price Wood"
).split()
JOBS = "Nurse Baker Pilot Driver Lawyer Farmer Teacher Doctor Painter Singer Waiter Editor Chemist Guard Clerk".split()
COLORS = {
    "red": (214, 39, 40),
    "blue": (31, 119, 180),
    "green": (44, 160, 44),
    "orange": (255, 140, 20),
    "purple": (140, 80, 190),
    "gray": (127, 127, 127),
    "brown": (130, 75, 50),
    "pink": (240, 130, 190),
}
TOPICS = (
    "Sales Visits Votes Exports Imports Births Prices Profits Costs Awards Loans Rents Trips Tickets Orders Repairs "
    "Points Members Goals Crops"
).split()
SCOPES = "Annual Monthly Weekly Total Average Public Private Global Local Urban Rural Rising".split()
COMPANIES = "Acme Nova Orion Delta Apex Lumen Vertex Summit Harbor Cedar Maple Falcon Atlas Comet Ridge Polar".split()
BUSINESSES = "Foods Market Motors Books Travel Energy Design Supply Trading Hotels Garden Sports Music Tools".split()
FORMS = "Library Hotel Travel School Medical Parking Gym Museum Visa Rental Job Club Tax Loan".split()
FORM_NOUNS = "Form Card Application Request Record Permit Report Sheet".split()
SUBJECTS = (
    "Price change;New contract;Late payment;Job offer;Annual meeting;Travel plans;Book order;Lost parcel;"
    "Summer sale;Rent increase;Team dinner;Project review;Budget plan;Water damage;Garden party;Road works"
).split(";")
PHRASES = (
    "thank you for your letter;we are happy to help;please reply by Friday;the parcel will arrive soon;"
    "our office is closed today;we met at the fair;your order is ready;see the new price list;"
    "the meeting was moved;we hope to see you;all papers are enclosed;call us at any time;"
    "the work starts in June;we accept your offer;nothing has changed here;the road is open again"
).split(";")

CATEGORIES: dict[str, list[str]] = {
    "country": COUNTRIES,
    "city": CITIES,
    "product": PRODUCTS,
    "fruit": FRUITS,
    "sport": SPORTS,
    "month": MONTHS,
    "day": DAYS,
    "year": YEARS,
}


def person(rng: random.Random) -> str:
    """A first and a last name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def date(rng: random.Random) -> str:
    """A date in one of three printed forms."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1998, 2026)
    form = rng.randrange(3)
    if form == 0:
        return f"{day} {MONTHS[month - 1]} {year}"
    if form == 1:
        return f"{year}-{month:02d}-{day:02d}"
    return f"{month:02d}/{day:02d}/{year}"


def chart_title(rng: random.Random) -> str:
    """A chart's title: three to five words."""
    title = f"{rng.choice(SCOPES)} {rng.choice(TOPICS)}"
    form = rng.randrange(3)
    if form == 0:
        return f"{title} in {rng.choice(YEARS)}"
    if form == 1:
        return f"{title} of {rng.choice(COMPANIES)}"
    return f"{title} in {rng.choice(COUNTRIES + CITIES)}"


def company(rng: random.Random) -> str:
    """A company or a shop."""
    return f"{rng.choice(COMPANIES)} {rng.choice(BUSINESSES)} {rng.choice(CITIES)}"


def form_title(rng: random.Random) -> str:
    """A form's heading."""
    return f"{rng.choice(CITIES)} {rng.choice(FORMS)} {rng.choice(FORM_NOUNS)}"
