//! Files → rows of named fields, each with its place.
