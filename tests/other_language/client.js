// Asks a server in JavaScript, knowing the .proto file alone: node client.js ADDRESS PROTO TASK_ID TEXT TASK_OF_IMAGES FILE SIZE
// FILE: an image. SIZE: pixels, that the task of images takes.
// Prints one JSON object.
'use strict'

const fs = require('fs')
const grpc = require('@grpc/grpc-js')
const path = require('path')
const protoLoader = require('@grpc/proto-loader')

const [address, proto, taskId, text, sight, file, size] = process.argv.slice(2)
const definition = protoLoader.loadSync(proto, {
  keepCase: true, enums: String, longs: Number, oneofs: true, includeDirs: [path.resolve(path.dirname(proto), '../..')]
})
const { Inference } = grpc.loadPackageDefinition(definition).mtlora.v1
const client = new Inference(address, grpc.credentials.createInsecure())

const unary = (method, request) =>
  new Promise((resolve, reject) => {
    client[method](request, (error, reply) => (error ? reject(error) : resolve(reply)))
  })

async function main () {
  const request = { task_id: taskId, text, without_adapter: true }
  const answer = await unary('Generate', request)
  let streamed = ''
  let last
  for await (last of client.GenerateStream(request)) streamed += last.text
  const items = [request, { task_id: 'no-such-task', text }]
  const batch = (await unary('GenerateBatch', { items })).items.map((item) => item.status.code ?? 0)
  const tasks = (await unary('ListTasks', {})).tasks.map((task) => task.id)
  const pixels = new Float32Array(3 * size * size).fill(0.5)
  const tensor = { shape: [3, Number(size), Number(size)], data: Buffer.from(pixels.buffer) }
  const images = [{ encoded: fs.readFileSync(file) }, { tensor }, { encoded: Buffer.from('no image') }]
  const { results } = await unary('Classify', { task_ids: [sight], images })
  const error = await unary('Generate', { task_id: 'no-such-task', text }).catch((caught) => caught)
  console.log(JSON.stringify({
    text: answer.text,
    summary: answer.summary,
    streamed,
    last_summary: last.summary,
    batch,
    tasks,
    images: results.map((each) => ({
      code: each.status?.code ?? 0,
      label: each.label ?? '',
      probabilities: Object.fromEntries(
        (each.probabilities ?? []).map(({ label, probability }) => [label, probability])
      )
    })),
    error: {
      code: grpc.status[error.code],
      request_id: error.metadata.get('x-request-id')[0],
      has_details: error.metadata.get('grpc-status-details-bin').length === 1
    }
  }))
  client.close()
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
