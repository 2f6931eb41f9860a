// What a user of a generated TypeScript client does: `node built/use.js URL KEY iris.onnx iris.csv`.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

declare const process: { argv: string[]; getBuiltinModule(name: "node:fs"): { readFileSync(path: string): Uint8Array } };

type Job = components["schemas"]["JobBody"];

const [url, key, model, table] = process.argv.slice(2) as [string, string, string, string];
const { readFileSync } = process.getBuiltinModule("node:fs");
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });
const bytes = { headers: { "Content-Type": "application/octet-stream" }, bodySerializer: (body: unknown) => body as BodyInit };

function check(holds: boolean, what: string): void {
  if (!holds) throw new Error(`expected ${what}`);
}

function given<T>(answer: { data?: T; error?: unknown }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

/** The job at its end: each request waits for a change. */
async function ended(job: Job): Promise<Job> {
  while (job.state === "queued" || job.state === "running") {
    const path = { job_id: job.id };
    job = given(await client.GET("/v1/jobs/{job_id}", { params: { path, query: { wait: 30 } } }));
  }
  return job;
}

// A body is typed as text: what is sent are bytes.
const file = (path: string) => readFileSync(path) as unknown as string;

const registered = given(
  await client.PUT("/v1/models/{name}", { params: { path: { name: "typescript" } }, body: file(model), ...bytes }),
);
check(registered.version === 1, "the first version");
const models = given(await client.GET("/v1/models", { params: { query: { q: "typescript" } } }));
check(models.models[0]?.name === "typescript", "the model in the list");

const uploaded = given(
  await client.POST("/v1/upload", { params: { query: { filename: "iris.csv" } }, body: file(table), ...bytes }),
);
check(uploaded.state === "uploaded", "an uploaded job");
const queued = given(
  await client.POST("/v1/predict/{job_id}", {
    params: { path: { job_id: uploaded.id } },
    body: { model: "typescript", metadata: { by: "a generated client" } },
  }),
);
const done = await ended(queued);
check(done.state === "completed" && done.rows.ok === 150, "150 scored rows");

const result = await client.GET("/v1/download/{job_id}", { params: { path: { job_id: done.id } }, parseAs: "text" });
check(given(result).trim().split("\n").length === 151, "a header and 150 rows");

const seen: string[] = [];
let after: string | null | undefined;
do {
  const query = { state: ["completed", "failed"] as const, sort: "finished" as const, total: true, limit: 1, after };
  const page = given(await client.GET("/v1/jobs", { params: { query: { ...query, state: [...query.state] } } }));
  seen.push(...page.jobs.map((job) => job.id));
  check(page.total !== null && page.total !== undefined && page.total >= 1, "a total");
  after = page.next;
} while (after);
check(seen.includes(done.id), "the job in the list");

const queuedAll = given(await client.POST("/v1/jobs/predict", { params: { query: { model: "typescript" } } }));
check(queuedAll.queued === 0 && queuedAll.jobs.length === 0, "no further upload");

const online = given(
  await client.POST("/v1/models/{name}/predict", {
    params: { path: { name: "typescript" } },
    body: { data: registered.sample },
  }),
);
check(online.prediction.length === registered.sample.length, "a prediction for each record");

const missing = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: "none" } } });
check(missing.error?.code === "job-not-found" && missing.error.status === 404, "a problem");
const wrong = await client.GET("/v1/jobs", { params: { query: { since: "soon" } } });
check(wrong.error?.code === "invalid-options", "a problem that names the parameter");

console.log("TypeScript: uploaded, predicted, polled, downloaded and listed");
