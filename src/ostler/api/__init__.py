"""HTTP in front of the host service: routes, who may use them, WebSockets, listeners. See docs/rest-api.md."""
