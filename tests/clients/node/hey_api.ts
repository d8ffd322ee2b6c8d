// Calls a server by the client of @hey-api/openapi-ts: node hey_api.js URL PICTURE. Prints what it got.
import { readFileSync } from "node:fs";
import { client } from "./generated/hey-api/client.gen";
import { createHeatmaps, inferClasses } from "./generated/hey-api/sdk.gen";
import type { HeatmapEntry, Problem } from "./generated/hey-api/types.gen";

const [url, picture] = process.argv.slice(2) as [string, string];
client.setConfig({ baseUrl: url });
const path = { id: "tiny" };
const images = [readFileSync(picture, "base64")];

async function byJson(): Promise<number | undefined> {
  const { data } = await createHeatmaps({ path, body: { images, target_classes: ["bee"] } });
  if (data?.result_format !== "results") throw new Error("no results");
  return data.results[0]?.heatmaps[0]?.class_id;
}

async function asDLResult(): Promise<number | undefined> {
  const { data } = await createHeatmaps({ path, body: { images, result_format: "dl_result" } });
  if (data?.result_format !== "dl_result") throw new Error("no DLResult");
  const best = data.results[0]?.classification_class_ids[0];
  const heatmaps = data.results[0]?.["heatmap_grad_cam"] as Record<string, HeatmapEntry> | undefined;
  return heatmaps?.[`heatmap_image_class_${best}`]?.class_id;
}

async function infer(): Promise<number | undefined> {
  const { data } = await inferClasses({ path, body: { images } });
  if (data?.result_format !== "results") throw new Error("no results");
  return data.results[0]?.classes[0]?.class_id;
}

async function failing(): Promise<Problem["code"] | undefined> {
  const { error } = await createHeatmaps({ path, body: { images, method: "grad_cm" } });
  return error?.code;
}

async function main(): Promise<void> {
  console.log(JSON.stringify([await byJson(), await asDLResult(), await infer(), await failing()]));
}

void main();
