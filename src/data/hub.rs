//! A MODEL argument → a directory: as it is, or fetched from the hub into the ecosystem's cache.
