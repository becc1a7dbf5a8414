(component
  (import "wasi:http/outgoing-handler@0.2.6" (instance))
  (import "wasi:keyvalue/store@0.2.0-draft" (instance))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
