from renting_kit import home  # noqa: F401
