(component
  (import "stagehost:stage/sql@0.2.0" (instance))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
