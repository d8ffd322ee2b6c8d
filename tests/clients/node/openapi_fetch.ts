// Calls a server by the types of openapi-typescript: node openapi_fetch.js URL PICTURE. Prints what it got.
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./generated/openapi-typescript";

type Form = components["schemas"]["HeatmapForm"];
type Code = components["schemas"]["Problem"]["code"];

const [url, picture] = process.argv.slice(2) as [string, string];
const client = createClient<paths, `application/${string}json`>({ baseUrl: url });
const params = { path: { id: "tiny" } };
const file = readFileSync(picture);

// In the types a file is a string: the serializer puts the file in its place.
function asForm(fields: Form): FormData {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  form.set("image", new Blob([file]), fields.image);
  return form;
}

async function byForm(): Promise<number | undefined> {
  const body: Form = { image: "picture", format: "gray" };
  const bodySerializer = () => asForm(body);
  const { data } = await client.POST("/models/{id}/heatmap", { params, body, bodySerializer });
  if (data?.result_format !== "results") throw new Error("no results");
  return data.results[0]?.heatmaps[0]?.class_id;
}

async function byJson(): Promise<number | undefined> {
  const body = { images: [file.toString("base64")], target_classes: ["bee"] };
  const { data } = await client.POST("/models/{id}/heatmap", { params, body });
  if (data?.result_format !== "results") throw new Error("no results");
  return data.results[0]?.heatmaps[0]?.class_id;
}

async function asDLResult(): Promise<number | undefined> {
  const body = { images: [file.toString("base64")], result_format: "dl_result" as const };
  const { data } = await client.POST("/models/{id}/heatmap", { params, body });
  if (data?.result_format !== "dl_result") throw new Error("no DLResult");
  const best = data.results[0]?.classification_class_ids[0];
  return data.results[0]?.["heatmap_grad_cam"]?.[`heatmap_image_class_${best}`]?.class_id;
}

async function infer(): Promise<number | undefined> {
  const { data } = await client.POST("/models/{id}/infer", { params, body: { images: [file.toString("base64")] } });
  if (data?.result_format !== "results") throw new Error("no results");
  return data.results[0]?.classes[0]?.class_id;
}

async function failing(): Promise<Code | undefined> {
  const body = { images: [file.toString("base64")], method: "grad_cm" };
  const { error } = await client.POST("/models/{id}/heatmap", { params, body });
  return error?.code;
}

async function main(): Promise<void> {
  const got = [await byForm(), await byJson(), await asDLResult(), await infer(), await failing()];
  console.log(JSON.stringify(got));
}

void main();
