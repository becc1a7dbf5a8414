// kafkajs on a broker: kafkajs.js BROKERS TOPIC. It creates the topic, produces to it in the codecs that kafkajs has, reads
// it in a group in two turns, does what an administrator does, and deletes it.
const assert = require('node:assert')
const { createRequire } = require('node:module')
// The modules are in the folder that KAFKA_CLIENTS names.
const of = createRequire(process.env.KAFKA_CLIENTS + '/')
const kafkajs = of('kafkajs')
const { Kafka, CompressionTypes, CompressionCodecs, ConfigResourceTypes } = kafkajs
const LZ4 = of('kafkajs-lz4')
const Snappy = of('kafkajs-snappy')

CompressionCodecs[CompressionTypes.LZ4] = new LZ4().codec
CompressionCodecs[CompressionTypes.Snappy] = Snappy

const CODECS = ['None', 'GZIP', 'Snappy', 'LZ4']
const PATIENCE_MS = 30000

async function main(brokers, topic) {
  const kafka = new Kafka({ clientId: 'test', brokers: brokers.split(','), logLevel: kafkajs.logLevel.ERROR })
  const admin = kafka.admin()
  await admin.connect()
  await admin.createTopics({ topics: [{ topic, numPartitions: 2 }], waitForLeaders: true })
  for (const turn of [0, 1]) {
    const expected = []
    const producer = kafka.producer({ idempotent: true })
    await producer.connect()
    for (const codec of CODECS) {
      const values = Array.from({ length: 20 }, (_, i) => `${turn} ${codec} ${i} ${'x'.repeat(100)}`)
      const messages = values.map((value, i) => ({ value, key: 'k', partition: i % 2, headers: { h: '1' } }))
      await producer.send({ topic, acks: -1, compression: CompressionTypes[codec], messages })
      expected.push(...values)
    }
    await producer.disconnect()
    assert.deepStrictEqual((await read(kafka, topic, expected.length)).sort(), expected.sort())
  }
  const groups = await admin.listGroups()
  assert(groups.groups.some((group) => group.groupId === topic))
  const offsets = await admin.fetchOffsets({ groupId: topic, topics: [topic] })
  assert.deepStrictEqual(offsets[0].partitions.map((each) => each.offset).sort(), ['80', '80'])
  const configEntries = [{ name: 'retention.ms', value: '77777' }]
  const resource = { type: ConfigResourceTypes.TOPIC, name: topic }
  await admin.alterConfigs({ validateOnly: false, resources: [{ ...resource, configEntries }] })
  const end = Date.now() + PATIENCE_MS
  for (;;) {
    const described = await admin.describeConfigs({ resources: [resource], includeSynonyms: false })
    const entries = described.resources[0].configEntries
    if (entries.find((entry) => entry.configName === 'retention.ms').configValue === '77777') break
    assert(Date.now() < end, 'the configuration is not told')
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
  await admin.createPartitions({ topicPartitions: [{ topic, count: 3 }] })
  await admin.deleteTopicRecords({ topic, partitions: [{ partition: 0, offset: '5' }] })
  await admin.deleteGroups([topic])
  await admin.deleteTopics({ topics: [topic] })
  await admin.disconnect()
}

async function read(kafka, topic, count) {
  const consumer = kafka.consumer({ groupId: topic })
  await consumer.connect()
  await consumer.subscribe({ topics: [topic], fromBeginning: true })
  const seen = []
  await new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`only ${seen.length} of ${count} records`)), PATIENCE_MS)
    const eachMessage = async ({ message }) => {
      seen.push(message.value.toString())
      if (seen.length === count) {
        clearTimeout(timer)
        resolve()
      }
    }
    consumer.run({ eachMessage }).catch(reject)
  })
  await consumer.disconnect()
  return seen
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error)
  process.exit(1)
})
