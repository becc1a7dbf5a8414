(component
  (import "wasi:io/poll@0.2.6" (instance (export "no-such-function" (func))))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
