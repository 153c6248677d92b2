"""The demo: levels of recycling compared on two small tasks whose data and weights come inside packages."""
