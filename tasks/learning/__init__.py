"""How we learn, and how well."""
